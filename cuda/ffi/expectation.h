// What a buffer must be, and the error that names the argument, what was got and what was expected.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>

#include "../params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

constexpr int64_t kAnySize = -1;
constexpr int64_t kMaxSize = std::numeric_limits<int>::max();  // launch parameters are int
constexpr ffi::DataType kInt32 = ffi::DataType::S32;
constexpr ffi::DataType kFloat16 = ffi::DataType::F16;
constexpr ffi::DataType kFloat32 = ffi::DataType::F32;

// Up to four sizes. No heap: a handler runs for every layer that is not replayed from a graph.
class Shape {
 public:
  constexpr Shape(std::integral auto... size)
      : sizes_{static_cast<int64_t>(size)...}, rank_(sizeof...(size)) {}
  constexpr operator std::span<const int64_t>() const { return {sizes_.data(), rank_}; }

 private:
  std::array<int64_t, 4> sizes_;
  size_t rank_;
};

// A buffer and what it must be.
struct Expectation {
  const char* name;  // as in the Python API
  ffi::AnyBuffer buffer;
  ffi::DataType dtype;
  Shape shape;
};

ffi::Error check(std::initializer_list<Expectation> expectations);

// From 1 to `most`; by default what is still an int after the launch side's own small factors.
ffi::Error check_count(const char* name, int64_t count, int64_t most = kMaxSize / 2);

// bfloat16 or float16: what the kernels that move a cache are built for.
ffi::Error check_half(const char* name, ffi::DataType dtype);

ffi::Error mismatch(const std::string& name, const std::string& got, const std::string& expected);

std::string dtype_name(ffi::DataType dtype);

// Of bfloat16, float16 or float32.
ElementType element_type(ffi::DataType dtype);

inline std::span<const int64_t> shape_of(const ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().size()};
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

}  // namespace flashmla
