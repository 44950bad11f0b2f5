#include "../cache/launch.h"
#include "cache_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error append_projected(cudaStream_t stream, ffi::AnyBuffer cache,
                                   ffi::AnyBuffer projected, ffi::AnyBuffer slots,
                                   ffi::AnyBuffer latent_norm, ffi::AnyBuffer cos,
                                   ffi::AnyBuffer sin, ffi::Result<ffi::AnyBuffer> written_cache,
                                   bool interleave, float norm_eps) {
  const AppendProjectedBuffers buffers = {
      .cache = cache,
      .projected = projected,
      .slots = slots,
      .latent_norm = latent_norm,
      .cos = cos,
      .sin = sin,
      .written_cache = *written_cache,
  };
  const ffi::ErrorOr<cache::AppendParams> params =
      append_projected_params(buffers, interleave, norm_eps);
  if (params.has_error()) return params.error();
  return launch_error(cache::launch_append(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_append_projected_handler, flashmla::append_projected,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // cache
                                  .Arg<xla::ffi::AnyBuffer>()  // projected
                                  .Arg<xla::ffi::AnyBuffer>()  // slots
                                  .Arg<xla::ffi::AnyBuffer>()  // latent_norm
                                  .Arg<xla::ffi::AnyBuffer>()  // cos
                                  .Arg<xla::ffi::AnyBuffer>()  // sin
                                  .Ret<xla::ffi::AnyBuffer>()  // cache
                                  .Attr<bool>("interleave")
                                  .Attr<float>("norm_eps"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
