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

// The epilogue's stores: the four lanes that hold a row swap fragments among themselves so that
// each stores 16 bytes and they fill 64 in a row. Stores cost by the lines they touch: 16-byte ones
// take half as long as 8-byte ones.

// Lane l of four gives its word b to lane b and gets that lane's word l.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (w & bit) continue;
      const uint32_t received = __shfl_xor_sync(~0u, high ? words[w] : words[w + bit], bit);
      words[w] = high ? received : words[w];
      words[w + bit] = high ? words[w + bit] : received;
    }
  }
}

// A row's 256 columns times `factor`, as T or, of a split, as float16.
template <class T>
__device__ __forceinline__ void store_row(uint16_t* row, const float (&out)[128], int which,
                                          float factor, bool whole, bool valid) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int block = 0; block < 32; block += 4) {
    uint32_t pairs[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int i = (block + b) * 4 + which * 2;
      const float low = out[i] * factor, high = out[i + 1] * factor;
      pairs[b] = whole ? pack_pair<T>(low, high) : pack_pair<__half>(low, high);
    }
    transpose_quad(pairs);
    if (valid) {
      *reinterpret_cast<uint4*>(row + (block + lane) * 8) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// The power of two that brings `most`, the largest of a row's values, to 2^14 … 2^15.
__device__ __forceinline__ float partial_scale(float most) {
  constexpr int kBias = 127, kTopExponent = 14, kLeastExponent = 40, kInfinite = 255;
  int exponent = __float_as_int(most) >> 23 & 0xFF;
  if (exponent == kInfinite) exponent = kBias + kTopExponent;  // beyond repair: as it is
  exponent = exponent > kLeastExponent ? exponent : kLeastExponent;
  return __int_as_float((2 * kBias + kTopExponent - exponent) << 23);
}

__device__ __forceinline__ float inverse_power(float power_of_two) {
  return __int_as_float((2 * 127 << 23) - __float_as_int(power_of_two));
}

// The largest of a row's values.
__device__ __forceinline__ float row_magnitude(const float (&out)[128], int which) {
  float most = 0.f;
#pragma unroll
  for (int i = which * 2; i < 128; i += 4) {
    most = fmaxf(most, fmaxf(fabsf(out[i]), fabsf(out[i + 1])));
  }
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  return fmaxf(most, __shfl_xor_sync(~0u, most, 2));
}

template <class T>
__device__ __forceinline__ void store_item(const Arguments& a, const BlockPlace& place, int request,
                                           int destination, int half, const float (&out)[128],
                                           const RowResult& result) {
  const bool whole = destination == kWhole;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int row = place.first_row + fragment_row(which);
    const bool valid = row < a.rows && destination != kNowhere;
    const bool speaks = valid && threadIdx.x % 4 == 0;
    float factor = result.inverse_sum[which];
    long long target;  // row of `out` or of the workspace
    if (whole) {
      target = query_vector(a, request, place.kv_head, valid ? row : 0);
      if (speaks && half == kLeftHalf) a.params.lse[target] = result.lse[which];
    } else {
      target = (static_cast<long long>(destination) * a.params.h_kv + place.kv_head) * a.rows + row;
      const float scale = partial_scale(row_magnitude(out, which) * factor);
      factor *= scale;
      if (speaks) {
        PartialRow& partial = a.params.partial_rows[target];
        partial.scale[half] = inverse_power(scale);
        if (half == kLeftHalf) partial.lse = result.lse[which];
      }
    }
    uint16_t* const rows = whole ? static_cast<uint16_t*>(a.params.out) : a.params.partial_out;
    store_row<T>(rows + target * kHeadDimV + half * (kHeadDimV / 2), out, which, factor, whole,
                 valid);
  }
}

}  // namespace flashmla::decode
