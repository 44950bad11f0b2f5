#include "../merge/launch.h"
#include "cache_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error merge_partials(cudaStream_t stream, ffi::AnyBuffer outs, ffi::AnyBuffer lses,
                                 ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse) {
  const ffi::ErrorOr<merge::MergeParams> params =
      merge_params({.outs = outs, .lses = lses, .out = *out, .lse = *lse});
  if (params.has_error()) return params.error();
  return launch_error(merge::launch_merge(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_merge_handler, flashmla::merge_partials,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // outs
                                  .Arg<xla::ffi::AnyBuffer>()   // lses
                                  .Ret<xla::ffi::AnyBuffer>()   // out
                                  .Ret<xla::ffi::AnyBuffer>(),  // lse
                              {xla::ffi::Traits::kCmdBufferCompatible});
