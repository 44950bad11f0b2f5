#include "queries_arguments.h"

#include <string>

namespace flashmla {

using queries::kTile;
using queries::QueriesParams;

constexpr int64_t kMostWidth = 1 << 20;
constexpr int64_t kMostHeads = 1 << 12;
constexpr int64_t kMostTokens = 1 << 20;  // a grid is 65535 blocks of 32 high

ffi::ErrorOr<QueriesParams> queries_params(const QueriesBuffers& buffers, bool interleave) {
  const ffi::DataType dtype = buffers.x.element_type();
  ffi::Error error = check_half("x", dtype);
  if (error.success()) {
    error = check({{"x", buffers.x, dtype, {kAnySize, kAnySize, kAnySize}},
                   {"key_up", buffers.key_up, dtype, {kAnySize, kAnySize, kKvLoraRank}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  const int64_t batch = shape_of(buffers.x)[0];
  const int64_t s_q = shape_of(buffers.x)[1];
  const int64_t width = shape_of(buffers.x)[2];
  const int64_t h_q = shape_of(buffers.key_up)[0];
  const int64_t nope = shape_of(buffers.key_up)[1];
  error = check_count("b * s_q", batch * s_q, kMostTokens);
  if (error.success()) error = check_count("width", width, kMostWidth);
  if (error.success()) error = check_count("h_q", h_q, kMostHeads);
  if (error.success() && width % kTile != 0) {
    error = mismatch("x", std::to_string(width) + " columns", "a multiple of 64");
  }
  if (error.success() && nope != 2 * kTile && nope != 3 * kTile) {
    error = mismatch("key_up", std::to_string(nope) + " columns of a head", "128 or 192");
  }
  if (error.success()) {
    error = check({{"query_up", buffers.query_up, dtype, {width, h_q, nope + kRopeDim}},
                   {"cos", buffers.cos, kFloat32, {batch, s_q, kRopeDim / 2}},
                   {"sin", buffers.sin, kFloat32, {batch, s_q, kRopeDim / 2}},
                   {"q_latent", buffers.q_latent, dtype, {batch, s_q, h_q, kKvLoraRank}},
                   {"q_rope", buffers.q_rope, dtype, {batch, s_q, h_q, kRopeDim}}});
  }
  if (error.failure()) return ffi::Unexpected(error);

  return QueriesParams{
      .element_type = element_type(dtype),
      .x = data<const void>(buffers.x),
      .query_up = data<const void>(buffers.query_up),
      .key_up = data<const void>(buffers.key_up),
      .down = nullptr,
      .cos = data<const float>(buffers.cos),
      .sin = data<const float>(buffers.sin),
      .q_latent = data<void>(buffers.q_latent),
      .q_rope = data<void>(buffers.q_rope),
      .projected = nullptr,
      .tokens = static_cast<int>(batch * s_q),
      .width = static_cast<int>(width),
      .h_q = static_cast<int>(h_q),
      .nope = static_cast<int>(nope),
      .interleave = interleave,
  };
}

ffi::Error add_down(const ffi::AnyBuffer& down, const ffi::AnyBuffer& projected,
                    QueriesParams& params) {
  params.down = data<const void>(down);
  params.projected = data<void>(projected);
  const ffi::DataType dtype = down.element_type();
  const ffi::DataType wanted =
      params.element_type == ElementType::kBfloat16 ? ffi::DataType::BF16 : kFloat16;
  ffi::Error error = check({{"down", down, wanted, {params.width, kHeadDimQk}},
                            {"projected", projected, dtype, {kAnySize, kAnySize, kHeadDimQk}}});
  if (error.success()) {
    const int64_t tokens = shape_of(projected)[0] * shape_of(projected)[1];
    if (tokens != params.tokens) {
      error =
          mismatch("projected", std::to_string(tokens) + " tokens", std::to_string(params.tokens));
    }
  }
  return error;
}

}  // namespace flashmla
