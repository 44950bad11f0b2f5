#include "arguments.h"

#include <array>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>

namespace flashmla {
namespace {

constexpr int64_t kAnySize = -1;
constexpr int64_t kMaxSize = std::numeric_limits<int>::max();  // launch parameters are int
constexpr ffi::DataType kInt32 = ffi::DataType::S32;
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

std::string dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::S32:
      return "int32";
    default:
      return "XLA type " + std::to_string(static_cast<int>(dtype));
  }
}

std::span<const int64_t> shape_of(const ffi::AnyBuffer& buffer) {
  return {buffer.dimensions().begin(), buffer.dimensions().size()};
}

// As JAX prints it: "int32[8,16]"; n stands for any size.
std::string describe(ffi::DataType dtype, std::span<const int64_t> shape) {
  std::string sizes;
  for (const int64_t size : shape) {
    if (!sizes.empty()) sizes += ",";
    sizes += size == kAnySize ? "n" : std::to_string(size);
  }
  return dtype_name(dtype) + "[" + sizes + "]";
}

ffi::Error mismatch(const std::string& name, const std::string& got, const std::string& expected) {
  return ffi::Error::InvalidArgument(name + ": got " + got + ", expected " + expected);
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

ffi::Error check(std::initializer_list<Expectation> expectations) {
  for (const Expectation& expected : expectations) {
    if (ffi::Error error = check(expected); error.failure()) return error;
  }
  return ffi::Error::Success();
}

// At least 1, and still an int after the launch side's own small factors.
ffi::Error check_count(const char* name, int64_t count) {
  if (1 <= count && count <= kMaxSize / 2) return ffi::Error::Success();
  return mismatch(name, std::to_string(count), "1 to " + std::to_string(kMaxSize / 2));
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

}  // namespace

ffi::ErrorOr<ScheduleParams> schedule_params(const ScheduleBuffers& buffers) {
  const auto& [cache_seqlens, metadata, num_splits] = buffers;
  ffi::Error error = check({
      {"cache_seqlens", cache_seqlens, kInt32, {kAnySize}},
      {"tile_scheduler_metadata", metadata, kInt32, {kAnySize, kScheduleColumns}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(cache_seqlens)[0];
  const int64_t num_sm_parts = shape_of(metadata)[0];
  error = check({{"num_splits", num_splits, kInt32, {batch + 1}}});
  if (error.success()) error = check_count("batch", batch);
  if (error.success()) error = check_count("num_sm_parts", num_sm_parts);
  if (error.failure()) return ffi::Unexpected(error);

  return ScheduleParams{
      .cache_seqlens = data<const int>(cache_seqlens),
      .tile_scheduler_metadata = data<int>(metadata),
      .num_splits = data<int>(num_splits),
      .batch = static_cast<int>(batch),
      .num_sm_parts = static_cast<int>(num_sm_parts),
  };
}

ffi::ErrorOr<DecodeParams> decode_params(const DecodeBuffers& buffers, float softmax_scale,
                                         bool causal) {
  const ffi::DataType dtype = buffers.q_latent.element_type();
  if (dtype != ffi::DataType::BF16 && dtype != ffi::DataType::F16) {
    return ffi::Unexpected(mismatch("q_latent", dtype_name(dtype), "bfloat16 or float16"));
  }
  // One q [batch, s_q, h_q, 576] may stand for both of its parts.
  const bool joined =
      shape_of(buffers.q_latent).size() == 4 && shape_of(buffers.q_latent).back() == kHeadDimQk;
  const int64_t q_latent_columns = joined ? kHeadDimQk : kKvLoraRank;
  const int64_t q_rope_columns = joined ? kHeadDimQk : kRopeDim;
  ffi::Error error = check({
      {"q_latent", buffers.q_latent, dtype, {kAnySize, kAnySize, kAnySize, q_latent_columns}},
      {"kv_cache", buffers.kv_cache, dtype, {kAnySize, kPageSize, kAnySize, kHeadDimQk}},
      {"tile_scheduler_metadata",
       buffers.tile_scheduler_metadata,
       kInt32,
       {kAnySize, kScheduleColumns}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(buffers.q_latent)[0];
  const int64_t s_q = shape_of(buffers.q_latent)[1];
  const int64_t h_q = shape_of(buffers.q_latent)[2];
  const int64_t num_pages = shape_of(buffers.kv_cache)[0];
  const int64_t h_kv = shape_of(buffers.kv_cache)[2];
  const int64_t num_sm_parts = shape_of(buffers.tile_scheduler_metadata)[0];
  error = check_count("batch", batch);
  if (error.success()) error = check_count("h_kv", h_kv);
  if (error.success() && h_q % h_kv != 0) {
    error = mismatch("h_q", std::to_string(h_q), "a multiple of h_kv " + std::to_string(h_kv));
  }
  if (error.success()) error = check_count("s_q * h_q", s_q * h_q);
  if (error.success()) error = check_count("num_sm_parts", num_sm_parts);
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t rows = s_q * h_q / h_kv;
  const int64_t slots = 2 * num_sm_parts;
  error = check({
      {"q_rope", buffers.q_rope, dtype, {batch, s_q, h_q, q_rope_columns}},
      {"block_table", buffers.block_table, kInt32, {batch, kAnySize}},
      {"cache_seqlens", buffers.cache_seqlens, kInt32, {batch}},
      {"num_splits", buffers.num_splits, kInt32, {batch + 1}},
      {"out", buffers.out, dtype, {batch, s_q, h_q, kHeadDimV}},
      {"lse", buffers.lse, kFloat32, {batch, s_q, h_q}},
      {"partial_out", buffers.partial_out, kFloat32, {slots, h_kv, rows, kHeadDimV}},
      {"partial_lse", buffers.partial_lse, kFloat32, {slots, h_kv, rows}},
  });
  if (error.failure()) return ffi::Unexpected(error);

  const uint16_t* const rope_part =
      data<const uint16_t>(buffers.q_rope) + (joined ? kKvLoraRank : 0);
  return DecodeParams{
      .element_type = dtype == ffi::DataType::BF16 ? ElementType::kBfloat16 : ElementType::kFloat16,
      .q_latent = data<const void>(buffers.q_latent),
      .q_rope = rope_part,
      .kv_cache = data<const void>(buffers.kv_cache),
      .block_table = data<const int>(buffers.block_table),
      .cache_seqlens = data<const int>(buffers.cache_seqlens),
      .tile_scheduler_metadata = data<const int>(buffers.tile_scheduler_metadata),
      .num_splits = data<const int>(buffers.num_splits),
      .out = data<void>(buffers.out),
      .lse = data<float>(buffers.lse),
      .partial_out = data<float>(buffers.partial_out),
      .partial_lse = data<float>(buffers.partial_lse),
      .q_latent_stride = static_cast<int>(q_latent_columns),
      .q_rope_stride = static_cast<int>(q_rope_columns),
      .batch = static_cast<int>(batch),
      .s_q = static_cast<int>(s_q),
      .h_q = static_cast<int>(h_q),
      .h_kv = static_cast<int>(h_kv),
      .num_pages = static_cast<int>(num_pages),
      .max_pages_per_seq = static_cast<int>(shape_of(buffers.block_table)[1]),
      .num_sm_parts = static_cast<int>(num_sm_parts),
      .softmax_scale = softmax_scale,
      .causal = causal,
  };
}

}  // namespace flashmla
