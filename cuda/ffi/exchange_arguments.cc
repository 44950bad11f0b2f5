#include "exchange_arguments.h"

#include "../exchange/mailbox.h"
#include "expectation.h"

namespace flashmla {
namespace {

using exchange::ExchangeParams;
using exchange::kAddressWords;
using exchange::kMaxDevices;
using exchange::kMaxRows;

constexpr ffi::DataType kUint32 = ffi::DataType::U32;

}  // namespace

ffi::ErrorOr<ExchangeParams> exchange_params(const ExchangeBuffers& buffers) {
  const ffi::DataType dtype = buffers.outs.element_type();
  ffi::Error error = check_half("outs", dtype);
  if (error.success()) {
    error = check({{"outs", buffers.outs, dtype, {kAnySize, kAnySize, kHeadDimV}},
                   {"addresses", buffers.addresses, kUint32, {kAnySize, kAddressWords}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t partials = shape_of(buffers.outs)[0];
  const int64_t rows = shape_of(buffers.outs)[1];
  const int64_t devices = shape_of(buffers.addresses)[0];
  error = check_count("n", partials, kMaxRows);
  if (error.success()) error = check_count("n * rows", partials * rows, kMaxRows);
  if (error.success()) error = check_count("devices", devices, kMaxDevices);
  if (error.success()) {
    error = check({{"lses", buffers.lses, kFloat32, {partials, rows}},
                   {"out", buffers.out, dtype, {rows, kHeadDimV}},
                   {"lse", buffers.lse, kFloat32, {rows}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  return ExchangeParams{
      .element_type = element_type(dtype),
      .outs = data<const void>(buffers.outs),
      .lses = data<const float>(buffers.lses),
      .addresses = data<const uint32_t>(buffers.addresses),
      .out = data<void>(buffers.out),
      .lse = data<float>(buffers.lse),
      .partials = static_cast<int>(partials),
      .rows = static_cast<int>(rows),
      .devices = static_cast<int>(devices),
      .two_rounds = false,
      .patience_ns = 0,
  };
}

ffi::ErrorOr<uint32_t*> address_target(ffi::AnyBuffer address, int64_t rows) {
  ffi::Error error = check_count("rows", rows, kMaxRows);
  if (error.success()) error = check({{"address", address, kUint32, {1, kAddressWords}}});
  if (error.failure()) return ffi::Unexpected(error);
  return data<uint32_t>(address);
}

}  // namespace flashmla
