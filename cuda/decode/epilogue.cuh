// What an item leaves behind: the finished rows of a whole request, or the partial result of a
// split.
#pragma once

#include "arguments.h"
#include "softmax.cuh"

namespace flashmla::decode {

// Finished values of this thread's two rows.
struct RowResult {
  float inverse_sum[2];
  float lse[2];  // natural logarithm; -inf for a row without keys
};

__device__ __forceinline__ RowResult finish_rows(const float (&row_max)[2],
                                                 const float (&total)[2]) {
  RowResult result;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const bool empty = total[which] == 0.f;  // NaN is not empty
    result.inverse_sum[which] = empty ? 0.f : 1.f / total[which];
    result.lse[which] = empty ? kNegativeInfinity : (row_max[which] + log2f(total[which])) * kLn2;
  }
  return result;
}

// A row's 32 column pairs as T. Neighbouring lanes swap so that each stores 8 bytes and the four
// lanes of a row fill a 32-byte sector.
template <class T>
__device__ __forceinline__ void store_row(T* row, const float (&out)[128], int which, float factor,
                                          bool valid) {
  const bool odd_lane = threadIdx.x % 2 != 0;
  const int column = odd_lane ? 8 + fragment_column(0) - 2 : fragment_column(0);
#pragma unroll
  for (int block = 0; block < 32; block += 2) {
    const int i = block * 4 + which * 2;
    const uint32_t first = pack_pair<T>(out[i] * factor, out[i + 1] * factor);
    const uint32_t second = pack_pair<T>(out[i + 4] * factor, out[i + 5] * factor);
    const uint32_t received = __shfl_xor_sync(~0u, odd_lane ? first : second, 1);
    const uint2 pair = odd_lane ? make_uint2(received, second) : make_uint2(first, received);
    if (valid) *reinterpret_cast<uint2*>(row + block * 8 + column) = pair;
  }
}

// The same as float32.
__device__ __forceinline__ void store_row(float* row, const float (&out)[128], int which,
                                          float factor, bool valid) {
  if (!valid) return;
#pragma unroll
  for (int block = 0; block < 32; ++block) {
    const int i = block * 4 + which * 2;
    *reinterpret_cast<float2*>(row + fragment_column(block)) =
        make_float2(out[i] * factor, out[i + 1] * factor);
  }
}

template <class T>
__device__ __forceinline__ void store_item(const Arguments& a, const BlockPlace& place, int request,
                                           int destination, int half, const float (&out)[128],
                                           const RowResult& result) {
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int row = place.first_row + fragment_row(which);
    const bool valid = row < a.rows && destination != kNowhere;
    const long long vector = query_vector(a, request, place.kv_head, valid ? row : 0);
    const long long partial =
        (static_cast<long long>(destination) * a.params.h_kv + place.kv_head) * a.rows + row;
    const int first_column = half * (kHeadDimV / 2);
    if (destination == kWhole) {
      T* const target = static_cast<T*>(a.params.out) + vector * kHeadDimV + first_column;
      store_row<T>(target, out, which, result.inverse_sum[which], valid);
    } else {
      float* const target = a.params.partial_out + partial * kHeadDimV + first_column;
      store_row(target, out, which, result.inverse_sum[which], valid);
    }
    if (half == kLeftHalf && valid && threadIdx.x % 4 == 0) {
      (destination == kWhole ? a.params.lse[vector] : a.params.partial_lse[partial]) =
          result.lse[which];
    }
  }
}

}  // namespace flashmla::decode
