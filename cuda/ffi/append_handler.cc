#include "../cache/launch.h"
#include "cache_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error append(cudaStream_t stream, ffi::AnyBuffer cache, ffi::AnyBuffer latent,
                         ffi::AnyBuffer rope, ffi::AnyBuffer slots, ffi::RemainingArgs rotation,
                         ffi::Result<ffi::AnyBuffer> written_cache, bool interleave) {
  const AppendBuffers buffers = {
      .cache = cache,
      .latent = latent,
      .rope = rope,
      .slots = slots,
      .rotation = rotation,
      .written_cache = *written_cache,
  };
  const ffi::ErrorOr<cache::AppendParams> params = append_params(buffers, interleave);
  if (params.has_error()) return params.error();
  return launch_error(cache::launch_append(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_append_handler, flashmla::append,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // cache
                                  .Arg<xla::ffi::AnyBuffer>()  // latent
                                  .Arg<xla::ffi::AnyBuffer>()  // rope
                                  .Arg<xla::ffi::AnyBuffer>()  // slots
                                  .RemainingArgs()             // cos, sin
                                  .Ret<xla::ffi::AnyBuffer>()  // cache
                                  .Attr<bool>("interleave"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
