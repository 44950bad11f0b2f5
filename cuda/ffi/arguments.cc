#include "arguments.h"

#include <cstdint>
#include <string>

#include "expectation.h"

namespace flashmla {

ffi::ErrorOr<ScheduleParams> schedule_params(const ScheduleBuffers& buffers) {
  const auto& [cache_seqlens, metadata, num_splits] = buffers;
  ffi::Error error = check({
      {"cache_seqlens", cache_seqlens, kInt32, {kAnySize}},
      {"tile_scheduler_metadata", metadata, kInt32, {kAnySize, kScheduleColumns}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(cache_seqlens)[0];
  const int64_t num_sm_parts = shape_of(metadata)[0];
  error = check({{"num_splits", num_splits, kInt32, {batch + 1}}});
  if (error.success()) error = check_count("batch", batch);
  if (error.success()) error = check_count("num_sm_parts", num_sm_parts);
  if (error.failure()) return ffi::Unexpected(error);

  return ScheduleParams{
      .cache_seqlens = data<const int>(cache_seqlens),
      .tile_scheduler_metadata = data<int>(metadata),
      .num_splits = data<int>(num_splits),
      .batch = static_cast<int>(batch),
      .num_sm_parts = static_cast<int>(num_sm_parts),
  };
}

ffi::ErrorOr<DecodeParams> decode_params(const DecodeBuffers& buffers, float softmax_scale,
                                         bool causal) {
  const ffi::DataType dtype = buffers.q_latent.element_type();
  ffi::Error error = check_half("q_latent", dtype);
  if (error.failure()) return ffi::Unexpected(error);
  // One q [batch, s_q, h_q, 576] may stand for both of its parts.
  const bool joined =
      shape_of(buffers.q_latent).size() == 4 && shape_of(buffers.q_latent).back() == kHeadDimQk;
  const int64_t q_latent_columns = joined ? kHeadDimQk : kKvLoraRank;
  const int64_t q_rope_columns = joined ? kHeadDimQk : kRopeDim;
  error = check({
      {"q_latent", buffers.q_latent, dtype, {kAnySize, kAnySize, kAnySize, q_latent_columns}},
      {"kv_cache", buffers.kv_cache, dtype, {kAnySize, kPageSize, kAnySize, kHeadDimQk}},
      {"tile_scheduler_metadata",
       buffers.tile_scheduler_metadata,
       kInt32,
       {kAnySize, kScheduleColumns}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(buffers.q_latent)[0];
  const int64_t s_q = shape_of(buffers.q_latent)[1];
  const int64_t h_q = shape_of(buffers.q_latent)[2];
  const int64_t num_pages = shape_of(buffers.kv_cache)[0];
  const int64_t h_kv = shape_of(buffers.kv_cache)[2];
  const int64_t num_sm_parts = shape_of(buffers.tile_scheduler_metadata)[0];
  error = check_count("batch", batch);
  if (error.success()) error = check_count("h_kv", h_kv);
  if (error.success() && h_q % h_kv != 0) {
    error = mismatch("h_q", std::to_string(h_q), "a multiple of h_kv " + std::to_string(h_kv));
  }
  if (error.success()) error = check_count("s_q * h_q", s_q * h_q);
  if (error.success()) error = check_count("num_sm_parts", num_sm_parts);
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t rows = s_q * h_q / h_kv;
  const int64_t slots = 2 * num_sm_parts;
  error = check({
      {"q_rope", buffers.q_rope, dtype, {batch, s_q, h_q, q_rope_columns}},
      {"block_table", buffers.block_table, kInt32, {batch, kAnySize}},
      {"cache_seqlens", buffers.cache_seqlens, kInt32, {batch}},
      {"num_splits", buffers.num_splits, kInt32, {batch + 1}},
      {"out", buffers.out, dtype, {batch, s_q, h_q, kHeadDimV}},
      {"lse", buffers.lse, kFloat32, {batch, s_q, h_q}},
      {"partial_out", buffers.partial_out, kFloat16, {slots, h_kv, rows, kHeadDimV}},
      {"partial_rows", buffers.partial_rows, kFloat32, {slots, h_kv, rows, kPartialRowFloats}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const uint16_t* const rope_part =
      data<const uint16_t>(buffers.q_rope) + (joined ? kKvLoraRank : 0);
  return DecodeParams{
      .element_type = element_type(dtype),
      .q_latent = data<const void>(buffers.q_latent),
      .q_rope = rope_part,
      .kv_cache = data<const void>(buffers.kv_cache),
      .block_table = data<const int>(buffers.block_table),
      .cache_seqlens = data<const int>(buffers.cache_seqlens),
      .tile_scheduler_metadata = data<const int>(buffers.tile_scheduler_metadata),
      .num_splits = data<const int>(buffers.num_splits),
      .out = data<void>(buffers.out),
      .lse = data<float>(buffers.lse),
      .partial_out = data<uint16_t>(buffers.partial_out),
      .partial_rows = data<PartialRow>(buffers.partial_rows),
      .q_latent_stride = static_cast<int>(q_latent_columns),
      .q_rope_stride = static_cast<int>(q_rope_columns),
      .batch = static_cast<int>(batch),
      .s_q = static_cast<int>(s_q),
      .h_q = static_cast<int>(h_q),
      .h_kv = static_cast<int>(h_kv),
      .num_pages = static_cast<int>(num_pages),
      .max_pages_per_seq = static_cast<int>(shape_of(buffers.block_table)[1]),
      .num_sm_parts = static_cast<int>(num_sm_parts),
      .softmax_scale = softmax_scale,
      .causal = causal,
  };
}

}  // namespace flashmla
