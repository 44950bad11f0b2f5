// The attention of a layer in one call: queries, append and decode, each kernel beginning while the
// one ahead ends. Where XLA puts calls of their own into a CUDA graph, none can.
#include "../cache/launch.h"
#include "../launch.h"
#include "../queries/launch.h"
#include "arguments.h"
#include "handlers.h"
#include "launch_error.h"
#include "queries_arguments.h"

namespace flashmla {
namespace {

struct AttentionBuffers {
  ffi::AnyBuffer source;         // [batch, s_q, width]; low rank: [at least batch, s_q, rank + 576]
  ffi::AnyBuffer side;           // down [width, 576]; low rank: query_norm [rank]
  ffi::AnyBuffer latent_norm;    // [512]
  ffi::AnyBuffer slots;          // [batch, s_q]
  ffi::AnyBuffer cos;            // [batch, s_q, 32]
  ffi::AnyBuffer sin;            // [batch, s_q, 32]
  ffi::AnyBuffer kv_cache;       // [num_pages, 64, 1, 576]
  ffi::AnyBuffer written_cache;  // the same memory
  ffi::AnyBuffer between;        // projected [batch, s_q, 576]; low rank: normed [batch, s_q, rank]
};

// Of a low rank, the rows that the projection down gave are normed for the queries as well.
ffi::ErrorOr<cache::AppendParams> append_params(const AttentionBuffers& buffers, bool low_rank,
                                                bool interleave, float norm_eps) {
  const ffi::DataType dtype = buffers.kv_cache.element_type();
  const ffi::AnyBuffer& rows = low_rank ? buffers.source : buffers.between;
  ffi::Error error = check({{"source", rows, dtype, {kAnySize, kAnySize, kAnySize}},
                            {"slots", buffers.slots, kInt32, {kAnySize, kAnySize}}});
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(buffers.slots)[0];
  const int64_t s_q = shape_of(buffers.slots)[1];
  const int64_t width = shape_of(rows)[2];
  const int64_t rank = width - kHeadDimQk;
  const int64_t num_pages = shape_of(buffers.kv_cache)[0];
  if (rank < 0 || rank % 8 != 0 || rank > cache::kMostRank || (rank > 0) != low_rank) {
    return ffi::Unexpected(mismatch("source", std::to_string(width) + " columns",
                                    "576, of a low rank 8 to 4096 more, in eights"));
  }
  if (shape_of(rows)[0] < batch || shape_of(rows)[1] != s_q) {
    return ffi::Unexpected(mismatch("source", "other rows than slots", "as many"));
  }
  error = check(
      {{"latent_norm", buffers.latent_norm, dtype, {kKvLoraRank}},
       {"cos", buffers.cos, kFloat32, {batch, s_q, kRopeDim / 2}},
       {"sin", buffers.sin, kFloat32, {batch, s_q, kRopeDim / 2}},
       {"kv_cache", buffers.kv_cache, dtype, {num_pages, kPageSize, 1, kHeadDimQk}},
       {"written_cache", buffers.written_cache, dtype, {num_pages, kPageSize, 1, kHeadDimQk}}});
  if (error.success() && low_rank) {
    error = check({{"query_norm", buffers.side, dtype, {rank}},
                   {"normed", buffers.between, dtype, {batch, s_q, rank}}});
  }
  if (error.success() && buffers.written_cache.untyped_data() != buffers.kv_cache.untyped_data()) {
    error = mismatch("written_cache", "other memory", "that of kv_cache");
  }
  if (error.failure()) return ffi::Unexpected(error);

  const uint16_t* const first = data<const uint16_t>(rows);
  return cache::AppendParams{
      .element_type = element_type(dtype),
      .rotation = interleave ? cache::Rotation::kInterleaved : cache::Rotation::kHalfSplit,
      .cache = data<void>(buffers.kv_cache),
      .latent = first + rank,
      .rope = first + rank + kKvLoraRank,
      .latent_stride = static_cast<int>(width),
      .rope_stride = static_cast<int>(width),
      .norm = data<const void>(buffers.latent_norm),
      .norm_eps = norm_eps,
      .slots = data<const int>(buffers.slots),
      .cos = data<const float>(buffers.cos),
      .sin = data<const float>(buffers.sin),
      .rows = static_cast<int>(batch * s_q),
      .num_pages = static_cast<int>(num_pages),
      .query_norm = low_rank ? data<const void>(buffers.side) : nullptr,
      .low_rank = first,
      .normed = data<void>(buffers.between),
      .rank = static_cast<int>(rank),
      .early_start = !low_rank,
  };
}

ffi::Error absorbed_attention(
    cudaStream_t stream, ffi::AnyBuffer source, ffi::AnyBuffer query_up, ffi::AnyBuffer key_up,
    ffi::AnyBuffer side, ffi::AnyBuffer latent_norm, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
    ffi::AnyBuffer slots, ffi::AnyBuffer kv_cache, ffi::AnyBuffer block_table,
    ffi::AnyBuffer cache_seqlens, ffi::AnyBuffer tile_scheduler_metadata, ffi::AnyBuffer num_splits,
    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> written_cache,
    ffi::Result<ffi::AnyBuffer> q_latent, ffi::Result<ffi::AnyBuffer> q_rope,
    ffi::Result<ffi::AnyBuffer> between, ffi::Result<ffi::AnyBuffer> lse,
    ffi::Result<ffi::AnyBuffer> partial_out, ffi::Result<ffi::AnyBuffer> partial_rows,
    float softmax_scale, float norm_eps, bool interleave, bool low_rank) {
  const AttentionBuffers buffers = {
      .source = source,
      .side = side,
      .latent_norm = latent_norm,
      .slots = slots,
      .cos = cos,
      .sin = sin,
      .kv_cache = kv_cache,
      .written_cache = *written_cache,
      .between = *between,
  };
  const QueriesBuffers query_buffers = {
      .x = low_rank ? *between : source,
      .query_up = query_up,
      .key_up = key_up,
      .cos = cos,
      .sin = sin,
      .q_latent = *q_latent,
      .q_rope = *q_rope,
  };
  const DecodeBuffers decode_buffers = {
      .q_latent = *q_latent,
      .q_rope = *q_rope,
      .kv_cache = kv_cache,
      .block_table = block_table,
      .cache_seqlens = cache_seqlens,
      .tile_scheduler_metadata = tile_scheduler_metadata,
      .num_splits = num_splits,
      .out = *out,
      .lse = *lse,
      .partial_out = *partial_out,
      .partial_rows = *partial_rows,
  };
  const ffi::ErrorOr<cache::AppendParams> append =
      append_params(buffers, low_rank, interleave, norm_eps);
  if (append.has_error()) return append.error();
  ffi::ErrorOr<queries::QueriesParams> queries = queries_params(query_buffers, interleave);
  if (queries.has_error()) return queries.error();
  ffi::ErrorOr<DecodeParams> decode = decode_params(decode_buffers, softmax_scale, /*causal=*/true);
  if (decode.has_error()) return decode.error();
  queries->early_start = low_rank;
  decode->early_start = true;

  if (low_rank) {
    if (const char* error = cache::launch_append(*append, stream)) return launch_error(error);
    if (const char* error = queries::launch_queries(*queries, stream)) return launch_error(error);
    return launch_error(launch_decode(*decode, stream));
  }
  if (ffi::Error error = add_down(side, *between, *queries); error.failure()) return error;
  if (const char* error = queries::launch_queries(*queries, stream)) return launch_error(error);
  if (const char* error = cache::launch_append(*append, stream)) return launch_error(error);
  return launch_error(launch_decode(*decode, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_absorbed_attention_handler, flashmla::absorbed_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // source
                                  .Arg<xla::ffi::AnyBuffer>()  // query_up
                                  .Arg<xla::ffi::AnyBuffer>()  // key_up
                                  .Arg<xla::ffi::AnyBuffer>()  // down or query_norm
                                  .Arg<xla::ffi::AnyBuffer>()  // latent_norm
                                  .Arg<xla::ffi::AnyBuffer>()  // cos
                                  .Arg<xla::ffi::AnyBuffer>()  // sin
                                  .Arg<xla::ffi::AnyBuffer>()  // slots
                                  .Arg<xla::ffi::AnyBuffer>()  // kv_cache
                                  .Arg<xla::ffi::AnyBuffer>()  // block_table
                                  .Arg<xla::ffi::AnyBuffer>()  // cache_seqlens
                                  .Arg<xla::ffi::AnyBuffer>()  // tile_scheduler_metadata
                                  .Arg<xla::ffi::AnyBuffer>()  // num_splits
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // kv_cache
                                  .Ret<xla::ffi::AnyBuffer>()  // q_latent
                                  .Ret<xla::ffi::AnyBuffer>()  // q_rope
                                  .Ret<xla::ffi::AnyBuffer>()  // projected or normed
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_out
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_rows
                                  .Attr<float>("softmax_scale")
                                  .Attr<float>("norm_eps")
                                  .Attr<bool>("interleave")
                                  .Attr<bool>("low_rank"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
