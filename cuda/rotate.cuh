// Rotary position embedding of 64 columns, eight at a time, in float32 and rounded once.
#pragma once

#include "params.h"
#include "vector.cuh"

namespace flashmla {

inline constexpr int kRopePairs = kRopeDim / 2;
inline constexpr int kRopeVectors = kRopeDim / kVectorColumns;

// Vector `index` of the rotated row, whose pairs end in columns (i, i + 32). `kInterleaved`: they
// come from columns (2i, 2i + 1). `row(i)` is where vector i of the row is, `cos` and `sin` [32]
// are the row's.
template <class T, bool kInterleaved, class Row>
__device__ __forceinline__ Vector<T> rotate_vector(Row row, const float* cos, const float* sin,
                                                   int index) {
  const int half = index % (kRopeVectors / 2);  // its pairs are 8 * half and the next seven
  const int low = kInterleaved ? 2 * half : half;
  const int high = kInterleaved ? 2 * half + 1 : half + kRopeVectors / 2;
  float both[2][kVectorColumns];
  float cosines[kVectorColumns];
  float sines[kVectorColumns];
  Vector<T>::load(row(low)).unpack(both[0]);
  Vector<T>::load(row(high)).unpack(both[1]);
  Vector<float>::load(cos + half * kVectorColumns).unpack(cosines);
  Vector<float>::load(sin + half * kVectorColumns).unpack(sines);
  float rotated[kVectorColumns];
#pragma unroll
  for (int i = 0; i < kVectorColumns; ++i) {
    constexpr int kHalf = kVectorColumns / 2;
    const float first = kInterleaved ? both[i / kHalf][2 * (i % kHalf)] : both[0][i];
    const float second = kInterleaved ? both[i / kHalf][2 * (i % kHalf) + 1] : both[1][i];
    rotated[i] = index == half ? first * cosines[i] - second * sines[i]
                               : second * cosines[i] + first * sines[i];
  }
  return Vector<T>::pack(rotated);
}

}  // namespace flashmla
