#include "expectation.h"

namespace flashmla {
namespace {

// As JAX prints it: "int32[8,16]"; n stands for any size.
std::string describe(ffi::DataType dtype, std::span<const int64_t> shape) {
  std::string sizes;
  for (const int64_t size : shape) {
    if (!sizes.empty()) sizes += ",";
    sizes += size == kAnySize ? "n" : std::to_string(size);
  }
  return dtype_name(dtype) + "[" + sizes + "]";
}

ffi::Error check(const Expectation& expected) {
  const std::span<const int64_t> got = shape_of(expected.buffer);
  const std::span<const int64_t> shape = expected.shape;
  bool legal = expected.buffer.element_type() == expected.dtype && got.size() == shape.size();
  for (size_t i = 0; legal && i < got.size(); ++i) {
    legal = got[i] <= kMaxSize && (shape[i] == kAnySize || shape[i] == got[i]);
  }
  if (legal) return ffi::Error::Success();
  return mismatch(expected.name, describe(expected.buffer.element_type(), got),
                  describe(expected.dtype, shape));
}

}  // namespace

ffi::Error check(std::initializer_list<Expectation> expectations) {
  for (const Expectation& expected : expectations) {
    if (ffi::Error error = check(expected); error.failure()) return error;
  }
  return ffi::Error::Success();
}

ffi::Error check_count(const char* name, int64_t count, int64_t most) {
  if (1 <= count && count <= most) return ffi::Error::Success();
  return mismatch(name, std::to_string(count), "1 to " + std::to_string(most));
}

ffi::Error check_half(const char* name, ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16 || dtype == ffi::DataType::F16) return ffi::Error::Success();
  return mismatch(name, dtype_name(dtype), "bfloat16 or float16");
}

ffi::Error mismatch(const std::string& name, const std::string& got, const std::string& expected) {
  return ffi::Error::InvalidArgument(name + ": got " + got + ", expected " + expected);
}

std::string dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::S32:
      return "int32";
    default:
      return "XLA type " + std::to_string(static_cast<int>(dtype));
  }
}

ElementType element_type(ffi::DataType dtype) {
  if (dtype == ffi::DataType::F32) return ElementType::kFloat32;
  return dtype == ffi::DataType::BF16 ? ElementType::kBfloat16 : ElementType::kFloat16;
}

}  // namespace flashmla
