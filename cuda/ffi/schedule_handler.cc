#include "../launch.h"
#include "arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error schedule(cudaStream_t stream, ffi::AnyBuffer cache_seqlens,
                           ffi::Result<ffi::AnyBuffer> tile_scheduler_metadata,
                           ffi::Result<ffi::AnyBuffer> num_splits) {
  const ffi::ErrorOr<ScheduleParams> params = schedule_params({
      .cache_seqlens = cache_seqlens,
      .tile_scheduler_metadata = *tile_scheduler_metadata,
      .num_splits = *num_splits,
  });
  if (params.has_error()) return params.error();
  return launch_error(launch_schedule(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_schedule_handler, flashmla::schedule,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // cache_seqlens
                                  .Ret<xla::ffi::AnyBuffer>()   // tile_scheduler_metadata
                                  .Ret<xla::ffi::AnyBuffer>(),  // num_splits
                              {xla::ffi::Traits::kCmdBufferCompatible});
