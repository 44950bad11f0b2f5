#include "../launch.h"
#include "arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

// A captured call is a graph of its own: there is nothing in it that it could overlap with.
static bool may_start_early(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status == cudaStreamCaptureStatusNone;
}

static ffi::Error decode(cudaStream_t stream, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope,
                         ffi::AnyBuffer kv_cache, ffi::AnyBuffer block_table,
                         ffi::AnyBuffer cache_seqlens, ffi::AnyBuffer tile_scheduler_metadata,
                         ffi::AnyBuffer num_splits, ffi::Result<ffi::AnyBuffer> out,
                         ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> partial_out,
                         ffi::Result<ffi::AnyBuffer> partial_rows, float softmax_scale,
                         bool causal) {
  const DecodeBuffers buffers = {
      .q_latent = q_latent,
      .q_rope = q_rope,
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
  ffi::ErrorOr<DecodeParams> params = decode_params(buffers, softmax_scale, causal);
  if (params.has_error()) return params.error();
  params->early_start = may_start_early(stream);
  return launch_error(launch_decode(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_decode_handler, flashmla::decode,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // q_latent
                                  .Arg<xla::ffi::AnyBuffer>()  // q_rope
                                  .Arg<xla::ffi::AnyBuffer>()  // kv_cache
                                  .Arg<xla::ffi::AnyBuffer>()  // block_table
                                  .Arg<xla::ffi::AnyBuffer>()  // cache_seqlens
                                  .Arg<xla::ffi::AnyBuffer>()  // tile_scheduler_metadata
                                  .Arg<xla::ffi::AnyBuffer>()  // num_splits
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_out
                                  .Ret<xla::ffi::AnyBuffer>()  // partial_rows
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
