#include "../cache/launch.h"
#include "cache_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error gather(cudaStream_t stream, ffi::AnyBuffer cache, ffi::AnyBuffer block_table,
                         ffi::AnyBuffer cache_seqlens, ffi::Result<ffi::AnyBuffer> tokens) {
  const ffi::ErrorOr<cache::GatherParams> params = gather_params({
      .cache = cache,
      .block_table = block_table,
      .cache_seqlens = cache_seqlens,
      .tokens = *tokens,
  });
  if (params.has_error()) return params.error();
  return launch_error(cache::launch_gather(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_gather_handler, flashmla::gather,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // cache
                                  .Arg<xla::ffi::AnyBuffer>()   // block_table
                                  .Arg<xla::ffi::AnyBuffer>()   // cache_seqlens
                                  .Ret<xla::ffi::AnyBuffer>(),  // tokens
                              {xla::ffi::Traits::kCmdBufferCompatible});
