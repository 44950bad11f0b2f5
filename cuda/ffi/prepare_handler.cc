// One-time work per device. XLA calls this stage with the device current and outside graph capture.
#include "../launch.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

static ffi::Error prepare() { return launch_error(prepare_device()); }

}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_prepare_handler, flashmla::prepare,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>());
