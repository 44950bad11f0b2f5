// A buffer made by hand and a count of failed expectations, for the tests of the handlers' checks.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

using Dtype = ffi::DataType;

// An XLA buffer that owns its sizes; nothing reads its elements.
struct Buffer {
  Dtype dtype;
  std::vector<int64_t> shape;
  XLA_FFI_Buffer raw = {};

  ffi::AnyBuffer view() {
    raw.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    raw.dtype = static_cast<XLA_FFI_DataType>(dtype);
    raw.data = this;
    raw.rank = static_cast<int64_t>(shape.size());
    raw.dims = shape.data();
    return ffi::AnyBuffer(&raw);
  }
};

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAIL %s\n", what.c_str());
  ++failures;
}

// The error after `break_it`; empty when the call is accepted all the same.
template <typename Call>
void expect_error(const std::string& text, const std::function<void(Call&)>& break_it) {
  Call call;
  break_it(call);
  const auto params = call.params();
  const std::string got = params.has_error() ? params.error().message() : "no error";
  expect(got == text, "got \"" + got + "\", expected \"" + text + "\"");
}

}  // namespace flashmla
