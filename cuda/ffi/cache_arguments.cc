#include "cache_arguments.h"

#include "expectation.h"

namespace flashmla {
namespace {

using cache::AppendParams;
using cache::GatherParams;
using cache::Rotation;
using merge::MergeParams;

constexpr int kVectorColumns = 8;  // the kernels move 16 bytes, or 32 of float32, at a time
constexpr int64_t kMostColumns = 1 << 30;

ffi::Error check_float(const char* name, ffi::DataType dtype) {
  if (dtype == kFloat32 || check_half(name, dtype).success()) return ffi::Error::Success();
  return mismatch(name, dtype_name(dtype), "bfloat16, float16 or float32");
}

// cos and sin as [rows, 32], into `params`.
ffi::Error read_rotation(const ffi::AnyBuffer& cos, const ffi::AnyBuffer& sin, bool interleave,
                         AppendParams& params) {
  const Shape shape = {params.rows, kRopeDim / 2};
  params.rotation = interleave ? Rotation::kInterleaved : Rotation::kHalfSplit;
  params.cos = data<const float>(cos);
  params.sin = data<const float>(sin);
  return check({{"cos", cos, kFloat32, shape}, {"sin", sin, kFloat32, shape}});
}

// The same where they may be left out.
ffi::Error read_rotation(const ffi::RemainingArgs& rotation, bool interleave,
                         AppendParams& params) {
  if (rotation.size() == 0) return ffi::Error::Success();
  if (rotation.size() != 2) {
    return mismatch("operands", std::to_string(4 + rotation.size()), "4, or 6 with cos and sin");
  }
  const ffi::ErrorOr<ffi::AnyBuffer> cos = rotation.get<ffi::AnyBuffer>(0);
  const ffi::ErrorOr<ffi::AnyBuffer> sin = rotation.get<ffi::AnyBuffer>(1);
  if (cos.has_error()) return cos.error();
  if (sin.has_error()) return sin.error();
  return read_rotation(*cos, *sin, interleave, params);
}

// The pool, before and after, and where its new rows go.
struct Places {
  ffi::AnyBuffer cache;
  ffi::AnyBuffer slots;
  ffi::AnyBuffer written_cache;
};

// Into `params`, which get the number of rows, and the cache's dtype.
ffi::Error read_places(const Places& places, int64_t rows, AppendParams& params) {
  const ffi::DataType dtype = places.cache.element_type();
  const int64_t num_pages = shape_of(places.cache)[0];
  ffi::Error error = check_count("n", rows);
  if (error.success()) {
    error = check(
        {{"slots", places.slots, kInt32, {rows}},
         {"written cache", places.written_cache, dtype, {num_pages, kPageSize, 1, kHeadDimQk}}});
  }
  if (error.failure()) return error;
  if (places.cache.untyped_data() != places.written_cache.untyped_data()) {
    return mismatch("cache", "another buffer than the result's", "the same (operand 0 aliased)");
  }
  params.element_type = element_type(dtype);
  params.cache = data<void>(places.written_cache);
  params.slots = data<const int>(places.slots);
  params.rows = static_cast<int>(rows);
  params.num_pages = static_cast<int>(num_pages);
  return error;
}

ffi::Error check_cache(const ffi::AnyBuffer& cache) {
  const ffi::DataType dtype = cache.element_type();
  const ffi::Error error = check_half("cache", dtype);
  if (error.failure()) return error;
  return check({{"cache", cache, dtype, {kAnySize, kPageSize, 1, kHeadDimQk}}});
}

}  // namespace

ffi::ErrorOr<AppendParams> append_params(const AppendBuffers& buffers, bool interleave) {
  const ffi::DataType dtype = buffers.cache.element_type();
  ffi::Error error = check_cache(buffers.cache);
  if (error.success()) error = check({{"latent", buffers.latent, dtype, {kAnySize, kKvLoraRank}}});
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t rows = shape_of(buffers.latent)[0];
  AppendParams params = {};
  error = read_places({buffers.cache, buffers.slots, buffers.written_cache}, rows, params);
  if (error.success()) error = check({{"rope", buffers.rope, dtype, {rows, kRopeDim}}});
  if (error.success()) error = read_rotation(buffers.rotation, interleave, params);
  if (error.failure()) return ffi::Unexpected(error);
  params.latent = data<const void>(buffers.latent);
  params.rope = data<const void>(buffers.rope);
  params.latent_stride = kKvLoraRank;
  params.rope_stride = kRopeDim;
  return params;
}

ffi::ErrorOr<AppendParams> append_projected_params(const AppendProjectedBuffers& buffers,
                                                   bool interleave, float norm_eps) {
  const ffi::DataType dtype = buffers.cache.element_type();
  ffi::Error error = check_cache(buffers.cache);
  if (error.success())
    error = check({{"projected", buffers.projected, dtype, {kAnySize, kAnySize}}});
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t rows = shape_of(buffers.projected)[0];
  const int64_t width = shape_of(buffers.projected)[1];
  if (width < kHeadDimQk || width > kMostColumns || width % kVectorColumns != 0) {
    return ffi::Unexpected(mismatch("projected", std::to_string(width) + " columns",
                                    "a multiple of 8 from 576 to 2^30"));
  }
  AppendParams params = {};
  error = read_places({buffers.cache, buffers.slots, buffers.written_cache}, rows, params);
  if (error.success()) error = check({{"latent_norm", buffers.latent_norm, dtype, {kKvLoraRank}}});
  if (error.success()) error = read_rotation(buffers.cos, buffers.sin, interleave, params);
  if (error.failure()) return ffi::Unexpected(error);
  const uint16_t* const cached = data<const uint16_t>(buffers.projected) + width - kHeadDimQk;
  params.latent = cached;
  params.rope = cached + kKvLoraRank;
  params.latent_stride = params.rope_stride = static_cast<int>(width);
  params.norm = data<const void>(buffers.latent_norm);
  params.norm_eps = norm_eps;
  return params;
}

ffi::ErrorOr<GatherParams> gather_params(const GatherBuffers& buffers) {
  const ffi::DataType dtype = buffers.cache.element_type();
  ffi::Error error = check_half("cache", dtype);
  if (error.success()) {
    error = check({{"cache", buffers.cache, dtype, {kAnySize, kPageSize, kAnySize, kHeadDimQk}},
                   {"block_table", buffers.block_table, kInt32, {kAnySize, kAnySize}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t h_kv = shape_of(buffers.cache)[2];
  const int64_t batch = shape_of(buffers.block_table)[0];
  const int64_t max_pages_per_seq = shape_of(buffers.block_table)[1];
  const int64_t max_tokens = max_pages_per_seq * kPageSize;
  error = check_count("b", batch);
  if (error.success()) error = check_count("max_pages_per_seq * 64", max_tokens);
  if (error.success()) error = check_count("h_kv * 64 * 576", h_kv * kPageSize * kHeadDimQk);
  if (error.success()) {
    error = check({{"cache_seqlens", buffers.cache_seqlens, kInt32, {batch}},
                   {"tokens", buffers.tokens, dtype, {batch, max_tokens, h_kv, kHeadDimQk}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  return GatherParams{
      .cache = data<const void>(buffers.cache),
      .block_table = data<const int>(buffers.block_table),
      .cache_seqlens = data<const int>(buffers.cache_seqlens),
      .tokens = data<void>(buffers.tokens),
      .batch = static_cast<int>(batch),
      .h_kv = static_cast<int>(h_kv),
      .num_pages = static_cast<int>(shape_of(buffers.cache)[0]),
      .max_pages_per_seq = static_cast<int>(max_pages_per_seq),
  };
}

ffi::ErrorOr<MergeParams> merge_params(const MergeBuffers& buffers) {
  const ffi::DataType dtype = buffers.outs.element_type();
  const ffi::DataType out_dtype = buffers.out.element_type();
  ffi::Error error = check_float("outs", dtype);
  if (error.success()) error = check_float("out", out_dtype);
  if (error.success()) {
    error = check({{"outs", buffers.outs, dtype, {kAnySize, kAnySize, kAnySize}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t partials = shape_of(buffers.outs)[0];
  const int64_t rows = shape_of(buffers.outs)[1];
  const int64_t head_dim = shape_of(buffers.outs)[2];
  error = check_count("n", partials);
  if (error.success()) error = check_count("rows", rows);
  if (error.success()) error = check_count("d", head_dim);
  if (error.success() && head_dim % kVectorColumns != 0) {
    error = mismatch("d", std::to_string(head_dim), "a multiple of 8");
  }
  if (error.success()) {
    error = check({{"lses", buffers.lses, kFloat32, {partials, rows}},
                   {"out", buffers.out, out_dtype, {rows, head_dim}},
                   {"lse", buffers.lse, kFloat32, {rows}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  return MergeParams{
      .partial_type = element_type(dtype),
      .out_type = element_type(out_dtype),
      .outs = data<const void>(buffers.outs),
      .lses = data<const float>(buffers.lses),
      .out = data<void>(buffers.out),
      .lse = data<float>(buffers.lse),
      .partials = static_cast<int>(partials),
      .rows = static_cast<int>(rows),
      .head_dim = static_cast<int>(head_dim),
  };
}

}  // namespace flashmla
