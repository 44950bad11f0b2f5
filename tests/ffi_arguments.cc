// Feeds the handlers' argument checks with buffers made by hand; test_ffi_arguments.py runs it.
#include "../cuda/ffi/arguments.h"
#include "ffi_buffers.h"

namespace flashmla {
namespace {

// batch 3, s_q 2, h_q 16, h_kv 2, 7 pages, table width 5, 4 parts; so rows = 2 * 16 / 2 = 16.
struct DecodeCall {
  Buffer q_latent = {Dtype::BF16, {3, 2, 16, 512}};
  Buffer q_rope = {Dtype::BF16, {3, 2, 16, 64}};
  Buffer kv_cache = {Dtype::BF16, {7, 64, 2, 576}};
  Buffer block_table = {Dtype::S32, {3, 5}};
  Buffer cache_seqlens = {Dtype::S32, {3}};
  Buffer tile_scheduler_metadata = {Dtype::S32, {4, 8}};
  Buffer num_splits = {Dtype::S32, {4}};
  Buffer out = {Dtype::BF16, {3, 2, 16, 512}};
  Buffer lse = {Dtype::F32, {3, 2, 16}};
  Buffer partial_out = {Dtype::F16, {8, 2, 16, 512}};
  Buffer partial_rows = {Dtype::F32, {8, 2, 16, 4}};

  ffi::ErrorOr<DecodeParams> params() {
    return decode_params({q_latent.view(), q_rope.view(), kv_cache.view(), block_table.view(),
                          cache_seqlens.view(), tile_scheduler_metadata.view(), num_splits.view(),
                          out.view(), lse.view(), partial_out.view(), partial_rows.view()},
                         0.125f, true);
  }
};

struct ScheduleCall {
  Buffer cache_seqlens = {Dtype::S32, {3}};
  Buffer tile_scheduler_metadata = {Dtype::S32, {4, 8}};
  Buffer num_splits = {Dtype::S32, {4}};

  ffi::ErrorOr<ScheduleParams> params() {
    return schedule_params(
        {cache_seqlens.view(), tile_scheduler_metadata.view(), num_splits.view()});
  }
};

void test_decode_reads_shapes_from_buffers() {
  DecodeCall call;
  const auto params = call.params();
  expect(params.has_value(), "a legal decode call is accepted");
  if (!params.has_value()) return;
  const DecodeParams& p = *params;
  expect(p.element_type == ElementType::kBfloat16, "element_type");
  expect(p.batch == 3 && p.s_q == 2 && p.h_q == 16 && p.h_kv == 2, "query sizes");
  expect(p.num_pages == 7 && p.max_pages_per_seq == 5 && p.num_sm_parts == 4, "cache sizes");
  expect(p.q_latent_stride == 512 && p.q_rope_stride == 64, "strides of the split query");
  expect(p.q_latent == &call.q_latent && p.q_rope == &call.q_rope, "the split query's addresses");
  expect(p.softmax_scale == 0.125f && p.causal, "attributes");
}

void test_decode_takes_a_joined_query() {
  DecodeCall call;
  call.q_latent.shape.back() = call.q_rope.shape.back() = 576;
  const auto params = call.params();
  expect(params.has_value(), "a joined query is accepted");
  if (!params.has_value()) return;
  const char* const start = reinterpret_cast<const char*>(&call.q_rope);
  expect(params->q_latent_stride == 576 && params->q_rope_stride == 576, "strides when joined");
  expect(params->q_rope == start + 512 * 2, "the rotary part starts at column 512");
}

void test_decode_takes_empty_pool_and_table() {
  DecodeCall call;
  call.kv_cache.shape[0] = 0;
  call.block_table.shape[1] = 0;
  expect(call.params().has_value(), "an empty pool and table are accepted");
}

void test_decode_errors() {
  const auto breaks = expect_error<DecodeCall>;
  breaks("q_latent: got float32, expected bfloat16 or float16",
         [](DecodeCall& c) { c.q_latent.dtype = Dtype::F32; });
  breaks("q_latent: got bfloat16[3,2,512], expected bfloat16[n,n,n,512]",
         [](DecodeCall& c) { c.q_latent.shape = {3, 2, 512}; });
  breaks("q_latent: got bfloat16[], expected bfloat16[n,n,n,512]",
         [](DecodeCall& c) { c.q_latent.shape = {}; });
  breaks("q_rope: got float16[3,2,16,64], expected bfloat16[3,2,16,64]",
         [](DecodeCall& c) { c.q_rope.dtype = Dtype::F16; });
  breaks("q_rope: got bfloat16[3,2,16,64], expected bfloat16[3,2,16,576]",
         [](DecodeCall& c) { c.q_latent.shape.back() = 576; });
  breaks("kv_cache: got bfloat16[7,32,2,576], expected bfloat16[n,64,n,576]",
         [](DecodeCall& c) { c.kv_cache.shape[1] = 32; });
  breaks("kv_cache: got bfloat16[2147483648,64,2,576], expected bfloat16[n,64,n,576]",
         [](DecodeCall& c) { c.kv_cache.shape[0] = int64_t{1} << 31; });
  breaks("batch: got 0, expected 1 to 1073741823", [](DecodeCall& c) { c.q_latent.shape[0] = 0; });
  breaks("h_kv: got 0, expected 1 to 1073741823", [](DecodeCall& c) { c.kv_cache.shape[2] = 0; });
  breaks("h_q: got 16, expected a multiple of h_kv 3",
         [](DecodeCall& c) { c.kv_cache.shape[2] = 3; });
  breaks("s_q * h_q: got 0, expected 1 to 1073741823",
         [](DecodeCall& c) { c.q_latent.shape[1] = 0; });
  breaks("num_sm_parts: got 0, expected 1 to 1073741823",
         [](DecodeCall& c) { c.tile_scheduler_metadata.shape[0] = 0; });
  breaks("tile_scheduler_metadata: got int32[4,7], expected int32[n,8]",
         [](DecodeCall& c) { c.tile_scheduler_metadata.shape[1] = 7; });
  breaks("block_table: got int32[2,5], expected int32[3,n]",
         [](DecodeCall& c) { c.block_table.shape[0] = 2; });
  breaks("cache_seqlens: got XLA type 5[3], expected int32[3]",
         [](DecodeCall& c) { c.cache_seqlens.dtype = Dtype::S64; });
  breaks("num_splits: got int32[3], expected int32[4]",
         [](DecodeCall& c) { c.num_splits.shape = {3}; });
  breaks("out: got bfloat16[3,2,16,576], expected bfloat16[3,2,16,512]",
         [](DecodeCall& c) { c.out.shape.back() = 576; });
  breaks("lse: got float32[3,16,2], expected float32[3,2,16]",
         [](DecodeCall& c) { c.lse.shape = {3, 16, 2}; });
  breaks("partial_out: got float16[4,2,16,512], expected float16[8,2,16,512]",
         [](DecodeCall& c) { c.partial_out.shape[0] = 4; });
  breaks("partial_rows: got float32[8,2,8,4], expected float32[8,2,16,4]",
         [](DecodeCall& c) { c.partial_rows.shape[2] = 8; });
}

void test_schedule() {
  ScheduleCall call;
  const auto params = call.params();
  expect(params.has_value() && params->batch == 3 && params->num_sm_parts == 4,
         "a legal schedule call is accepted");
  const auto breaks = expect_error<ScheduleCall>;
  breaks("cache_seqlens: got int32[3,1], expected int32[n]",
         [](ScheduleCall& c) { c.cache_seqlens.shape = {3, 1}; });
  breaks("tile_scheduler_metadata: got int32[32], expected int32[n,8]",
         [](ScheduleCall& c) { c.tile_scheduler_metadata.shape = {32}; });
  breaks("num_splits: got int32[3], expected int32[4]",
         [](ScheduleCall& c) { c.num_splits.shape = {3}; });
}

}  // namespace
}  // namespace flashmla

int main() {
  flashmla::test_decode_reads_shapes_from_buffers();
  flashmla::test_decode_takes_a_joined_query();
  flashmla::test_decode_takes_empty_pool_and_table();
  flashmla::test_decode_errors();
  flashmla::test_schedule();
  return flashmla::failures == 0 ? 0 : 1;
}
