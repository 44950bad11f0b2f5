// The weighted sum of partial results, in float32: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max).
#pragma once

#include <cmath>

namespace flashmla::merge {

inline constexpr float kNegativeInfinity = -INFINITY;

// The weighted sum of some partials of a few columns.
template <int kColumns>
struct Sum {
  float values[kColumns] = {};
  float max_lse = kNegativeInfinity;
  float weight = 0.f;  // Σ exp(lse - max_lse)

  // Raises the reference to `lse`; what is there shrinks accordingly.
  __device__ __forceinline__ void raise(float lse) {
    if (lse <= max_lse) return;
    const float factor = __expf(max_lse - lse);
    weight *= factor;
#pragma unroll
    for (float& value : values) value *= factor;
    max_lse = lse;
  }

  // exp(lse - max_lse); 0 for empty partials, also while all were empty.
  __device__ __forceinline__ float weight_of(float lse) const {
    return lse == kNegativeInfinity ? 0.f : __expf(lse - max_lse);
  }

  __device__ __forceinline__ void add(float factor, const float (&other)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] += factor * other[i];
  }

  // What remains is the merged columns. Returns their lse.
  __device__ __forceinline__ float finish() {
    const bool empty = weight == 0.f;  // NaN is not empty
    const float factor = empty ? 0.f : 1.f / weight;
#pragma unroll
    for (float& value : values) value *= factor;
    return empty ? kNegativeInfinity : max_lse + logf(weight);
  }
};

}  // namespace flashmla::merge
