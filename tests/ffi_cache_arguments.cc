// Feeds the checks of the cache handlers with buffers made by hand; test_ffi_arguments.py runs it.
#include <utility>

#include "../cuda/ffi/cache_arguments.h"
#include "ffi_buffers.h"

namespace flashmla {
namespace {

// Five rows into seven pages.
struct AppendCall {
  Buffer cache = {Dtype::BF16, {7, 64, 1, 576}};
  Buffer latent = {Dtype::BF16, {5, 512}};
  Buffer rope = {Dtype::BF16, {5, 64}};
  Buffer slots = {Dtype::S32, {5}};
  std::vector<Buffer> rotation = {{Dtype::F32, {5, 32}}, {Dtype::F32, {5, 32}}};
  Buffer written_cache = {Dtype::BF16, {7, 64, 1, 576}};
  bool aliased = true;
  bool interleave = false;

  ffi::ErrorOr<cache::AppendParams> params() {
    // RemainingArgs reads the buffers as XLA lays them out in a call.
    std::vector<XLA_FFI_ArgType> types(rotation.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<void*> values;
    for (Buffer& buffer : rotation) {
      buffer.view();
      values.push_back(&buffer.raw);
    }
    XLA_FFI_Args args = {};
    args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
    args.size = static_cast<int64_t>(values.size());
    args.types = types.data();
    args.args = values.data();
    ffi::AnyBuffer written = written_cache.view();
    if (aliased) written_cache.raw.data = &cache;
    return append_params({cache.view(), latent.view(), rope.view(), slots.view(),
                          ffi::RemainingArgs(&args, 0), written},
                         interleave);
  }
};

// The same rows behind a low-rank query of 32.
struct AppendProjectedCall {
  Buffer cache = {Dtype::F16, {7, 64, 1, 576}};
  Buffer projected = {Dtype::F16, {5, 608}};
  Buffer slots = {Dtype::S32, {5}};
  Buffer latent_norm = {Dtype::F16, {512}};
  Buffer cos = {Dtype::F32, {5, 32}};
  Buffer sin = {Dtype::F32, {5, 32}};
  Buffer written_cache = {Dtype::F16, {7, 64, 1, 576}};
  bool aliased = true;

  ffi::ErrorOr<cache::AppendParams> params() {
    ffi::AnyBuffer written = written_cache.view();
    if (aliased) written_cache.raw.data = &cache;
    return append_projected_params({cache.view(), projected.view(), slots.view(),
                                    latent_norm.view(), cos.view(), sin.view(), written},
                                   true, 1e-5f);
  }
};

// Three requests of up to five pages, two KV heads.
struct GatherCall {
  Buffer cache = {Dtype::F16, {7, 64, 2, 576}};
  Buffer block_table = {Dtype::S32, {3, 5}};
  Buffer cache_seqlens = {Dtype::S32, {3}};
  Buffer tokens = {Dtype::F16, {3, 320, 2, 576}};

  ffi::ErrorOr<cache::GatherParams> params() {
    return gather_params({cache.view(), block_table.view(), cache_seqlens.view(), tokens.view()});
  }
};

// Four partials of nine rows.
struct MergeCall {
  Buffer outs = {Dtype::F32, {4, 9, 512}};
  Buffer lses = {Dtype::F32, {4, 9}};
  Buffer out = {Dtype::BF16, {9, 512}};
  Buffer lse = {Dtype::F32, {9}};

  ffi::ErrorOr<merge::MergeParams> params() {
    return merge_params({outs.view(), lses.view(), out.view(), lse.view()});
  }
};

void test_append() {
  AppendCall call;
  const auto params = call.params();
  expect(params.has_value(), "a legal append is accepted");
  if (!params.has_value()) return;
  expect(params->rows == 5 && params->num_pages == 7, "append sizes");
  expect(params->rotation == cache::Rotation::kHalfSplit, "half-split");
  expect(params->cache == &call.cache && params->sin != nullptr, "append addresses");
  call.interleave = true;
  expect(call.params()->rotation == cache::Rotation::kInterleaved, "interleaved");
  call.rotation.clear();
  expect(call.params()->rotation == cache::Rotation::kNone, "no cos and sin: no rotation");
}

void test_append_errors() {
  const auto breaks = expect_error<AppendCall>;
  breaks("cache: got float32, expected bfloat16 or float16",
         [](AppendCall& c) { c.cache.dtype = Dtype::F32; });
  breaks("cache: got bfloat16[7,64,2,576], expected bfloat16[n,64,1,576]",
         [](AppendCall& c) { c.cache.shape[2] = 2; });
  breaks("latent: got bfloat16[5,576], expected bfloat16[n,512]",
         [](AppendCall& c) { c.latent.shape[1] = 576; });
  breaks("n: got 0, expected 1 to 1073741823", [](AppendCall& c) { c.latent.shape[0] = 0; });
  breaks("rope: got float16[5,64], expected bfloat16[5,64]",
         [](AppendCall& c) { c.rope.dtype = Dtype::F16; });
  breaks("slots: got int32[4], expected int32[5]", [](AppendCall& c) { c.slots.shape = {4}; });
  breaks("written cache: got bfloat16[6,64,1,576], expected bfloat16[7,64,1,576]",
         [](AppendCall& c) { c.written_cache.shape[0] = 6; });
  breaks("cache: got another buffer than the result's, expected the same (operand 0 aliased)",
         [](AppendCall& c) { c.aliased = false; });
  breaks("operands: got 5, expected 4, or 6 with cos and sin",
         [](AppendCall& c) { c.rotation.pop_back(); });
  breaks("cos: got bfloat16[5,32], expected float32[5,32]",
         [](AppendCall& c) { c.rotation[0].dtype = Dtype::BF16; });
  breaks("sin: got float32[5,64], expected float32[5,32]",
         [](AppendCall& c) { c.rotation[1].shape[1] = 64; });
}

void test_append_projected() {
  AppendProjectedCall call;
  const auto params = call.params();
  expect(params.has_value(), "a legal append of projected rows is accepted");
  if (!params.has_value()) return;
  const auto* const rows = reinterpret_cast<const uint16_t*>(&call.projected);
  expect(params->latent == rows + 32 && params->rope == rows + 32 + 512, "where a row begins");
  expect(params->latent_stride == 608 && params->rope_stride == 608, "from row to row");
  expect(params->norm == &call.latent_norm && params->norm_eps == 1e-5f, "the norm");
  expect(params->rotation == cache::Rotation::kInterleaved && params->rows == 5, "the rest");

  const auto breaks = expect_error<AppendProjectedCall>;
  breaks("projected: got 568 columns, expected a multiple of 8 from 576 to 2^30",
         [](AppendProjectedCall& c) { c.projected.shape[1] = 568; });
  breaks("projected: got 612 columns, expected a multiple of 8 from 576 to 2^30",
         [](AppendProjectedCall& c) { c.projected.shape[1] = 612; });
  breaks("projected: got bfloat16[5,608], expected float16[n,n]",
         [](AppendProjectedCall& c) { c.projected.dtype = Dtype::BF16; });
  breaks("latent_norm: got float16[576], expected float16[512]",
         [](AppendProjectedCall& c) { c.latent_norm.shape = {576}; });
  breaks("slots: got int32[4], expected int32[5]",
         [](AppendProjectedCall& c) { c.slots.shape = {4}; });
  breaks("sin: got float32[5,64], expected float32[5,32]",
         [](AppendProjectedCall& c) { c.sin.shape[1] = 64; });
  breaks("cache: got another buffer than the result's, expected the same (operand 0 aliased)",
         [](AppendProjectedCall& c) { c.aliased = false; });
}

void test_gather() {
  GatherCall call;
  const auto params = call.params();
  expect(params.has_value() && params->batch == 3 && params->max_pages_per_seq == 5 &&
             params->h_kv == 2 && params->num_pages == 7,
         "a legal gather is accepted");
  const auto breaks = expect_error<GatherCall>;
  breaks("cache: got int32, expected bfloat16 or float16",
         [](GatherCall& c) { std::swap(c.cache, c.block_table); });
  breaks("b: got 0, expected 1 to 1073741823", [](GatherCall& c) { c.block_table.shape[0] = 0; });
  breaks("max_pages_per_seq * 64: got 0, expected 1 to 1073741823",
         [](GatherCall& c) { c.block_table.shape[1] = 0; });
  breaks("h_kv * 64 * 576: got 0, expected 1 to 1073741823",
         [](GatherCall& c) { c.cache.shape[2] = 0; });
  breaks("cache_seqlens: got int32[2], expected int32[3]",
         [](GatherCall& c) { c.cache_seqlens.shape = {2}; });
  breaks("tokens: got float16[3,320,1,576], expected float16[3,320,2,576]",
         [](GatherCall& c) { c.tokens.shape[2] = 1; });
}

void test_merge() {
  MergeCall call;
  const auto params = call.params();
  expect(params.has_value() && params->partials == 4 && params->rows == 9 &&
             params->head_dim == 512 && params->partial_type == ElementType::kFloat32 &&
             params->out_type == ElementType::kBfloat16,
         "a legal merge is accepted");
  const auto breaks = expect_error<MergeCall>;
  breaks("outs: got int32, expected bfloat16, float16 or float32",
         [](MergeCall& c) { c.outs.dtype = Dtype::S32; });
  breaks("outs: got float32[4,512], expected float32[n,n,n]",
         [](MergeCall& c) { c.outs.shape = {4, 512}; });
  breaks("n: got 0, expected 1 to 1073741823", [](MergeCall& c) { c.outs.shape[0] = 0; });
  breaks("d: got 12, expected a multiple of 8", [](MergeCall& c) { c.outs.shape[2] = 12; });
  breaks("lses: got float32[9,4], expected float32[4,9]",
         [](MergeCall& c) { c.lses.shape = {9, 4}; });
  breaks("out: got bfloat16[9,64], expected bfloat16[9,512]",
         [](MergeCall& c) { c.out.shape[1] = 64; });
  breaks("lse: got bfloat16[9], expected float32[9]",
         [](MergeCall& c) { c.lse.dtype = Dtype::BF16; });
}

}  // namespace
}  // namespace flashmla

int main() {
  flashmla::test_append();
  flashmla::test_append_errors();
  flashmla::test_append_projected();
  flashmla::test_gather();
  flashmla::test_merge();
  return flashmla::failures == 0 ? 0 : 1;
}
