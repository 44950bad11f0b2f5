#include "../exchange/launch.h"
#include "exchange_arguments.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

static ffi::Error exchange_partials(cudaStream_t stream, ffi::AnyBuffer outs, ffi::AnyBuffer lses,
                                    ffi::AnyBuffer addresses, ffi::Result<ffi::AnyBuffer> out,
                                    ffi::Result<ffi::AnyBuffer> lse) {
  ffi::ErrorOr<exchange::ExchangeParams> params = exchange_params(
      {.outs = outs, .lses = lses, .addresses = addresses, .out = *out, .lse = *lse});
  if (params.has_error()) return params.error();
  params->two_rounds = exchange::takes_two_rounds(params->partials, params->rows, params->devices);
  params->patience_ns = exchange::patience_ns();
  return launch_error(exchange::launch_exchange(*params, stream));
}

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_exchange_handler, flashmla::exchange_partials,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // outs
                                  .Arg<xla::ffi::AnyBuffer>()   // lses
                                  .Arg<xla::ffi::AnyBuffer>()   // addresses
                                  .Ret<xla::ffi::AnyBuffer>()   // out
                                  .Ret<xla::ffi::AnyBuffer>(),  // lse
                              {xla::ffi::Traits::kCmdBufferCompatible});
