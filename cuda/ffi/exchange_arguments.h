// What XLA hands to the handlers of the exchange, checked before a launch sees it. No CUDA in here.
#pragma once

#include "../exchange/params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

struct ExchangeBuffers {
  ffi::AnyBuffer outs;       // [partials, rows, 512]
  ffi::AnyBuffer lses;       // [partials, rows]
  ffi::AnyBuffer addresses;  // [devices, 8]
  ffi::AnyBuffer out;        // [rows, 512]
  ffi::AnyBuffer lse;        // [rows]
};

// The launch parameters that the buffers spell, or an error naming the argument, what was got and
// what was expected.
ffi::ErrorOr<exchange::ExchangeParams> exchange_params(const ExchangeBuffers& buffers);

// Where the address goes, uint32 [1, 8], of a mailbox for so many rows.
ffi::ErrorOr<uint32_t*> address_target(ffi::AnyBuffer address, int64_t rows);

}  // namespace flashmla
