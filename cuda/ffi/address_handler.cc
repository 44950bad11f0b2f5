#include "../exchange/launch.h"
#include "exchange_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error address(cudaStream_t stream, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> address,
                          int32_t rows) {
  const ffi::ErrorOr<uint32_t*> target = address_target(*address, rows);
  if (target.has_error()) return target.error();
  return launch_error(exchange::launch_address(*target, rows, stream));
}

}  // namespace flashmla

// Never captured into a graph: it may allocate.
XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_address_handler, flashmla::address,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // index, which nobody reads
                                  .Ret<xla::ffi::AnyBuffer>()  // address
                                  .Attr<int32_t>("rows"));
