// The launch API's answer as XLA's.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace flashmla {

inline ::xla::ffi::Error launch_error(const char* reason) {
  if (reason == nullptr) return ::xla::ffi::Error::Success();
  return ::xla::ffi::Error::Internal(reason);
}

}  // namespace flashmla
