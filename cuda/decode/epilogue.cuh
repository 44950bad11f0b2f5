// What an item leaves behind: the finished rows of a whole request, or the partial result of a
// split.
#pragma once

#include "arguments.h"
#include "softmax.cuh"

namespace flashmla::decode {

// What a row without keys is multiplied by is 0.
__device__ __forceinline__ float inverse_sum(float total) {
  return total == 0.f ? 0.f : __fdividef(1.f, total);  // NaN is not empty
}

// Natural logarithm of a row's sum of exponentials; -inf for a row without keys.
__device__ __forceinline__ float log_sum(float reference, float total) {
  return total == 0.f ? kNegativeInfinity : (reference + __log2f(total)) * kLn2;
}

// Stores cost by the lines they touch, so a lane stores 16 bytes, and the four that hold a row 64
// in a row. For a whole request they swap fragments to have the columns in order. A split's rows
// stay as fragments have them: of each 32 columns, lane q stores columns 2 q, 2 q + 1 of four
// blocks of eight. Combine puts them in order, once for all splits.

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

// The word that stands at this place of a row after transpose_quad, of the row before it: quads of
// 16 words each.
__device__ __forceinline__ int transposed_word(int place) {
  return place / 16 * 16 + place % 4 * 4 + place / 4 % 4;
}

// A row's 256 columns times `factor`: as T in order or, of a split, as float16 as they are.
template <class T, bool kInOrder>
__device__ __forceinline__ void store_row(uint16_t* row, const float (&out)[128], int which,
                                          float factor, bool valid) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int block = 0; block < 32; block += 4) {
    uint32_t pairs[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int i = (block + b) * 4 + which * 2;
      pairs[b] = pack_pair<T>(out[i] * factor, out[i + 1] * factor);
    }
    if constexpr (kInOrder) transpose_quad(pairs);
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

// The largest of a row's values, by four chains at once.
__device__ __forceinline__ float row_magnitude(const float (&out)[128], int which) {
  float most[4] = {};
#pragma unroll
  for (int i = which * 2; i < 128; i += 4) {
    float& chain = most[i / 4 % 4];
    chain = fmaxf(chain, fmaxf(fabsf(out[i]), fabsf(out[i + 1])));
  }
  float all = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
  all = fmaxf(all, __shfl_xor_sync(~0u, all, 1));
  return fmaxf(all, __shfl_xor_sync(~0u, all, 2));
}

// What a thread knows of its two rows at the end of an item.
struct RowEnds {
  float reference[2];
  float total[2];      // sum of weights
  float magnitude[2];  // the largest value before it is divided by the sum; only of a split
};

template <class T>
__device__ __forceinline__ void store_item(const Arguments& a, const BlockPlace& place, int request,
                                           int destination, int half, const float (&out)[128],
                                           const RowEnds& ends) {
  const bool whole = destination == kWhole;
  const int columns = half * (kHeadDimV / 2);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int row = place.first_row + fragment_row(which);
    const bool valid = row < a.rows && destination != kNowhere;
    const bool speaks = valid && threadIdx.x % 4 == 0;
    const float factor = inverse_sum(ends.total[which]);
    float* lse;
    if (whole) {
      const long long vector = query_vector(a, request, place.kv_head, valid ? row : 0);
      uint16_t* const out_row = static_cast<uint16_t*>(a.params.out) + vector * kHeadDimV;
      store_row<T, true>(out_row + columns, out, which, factor, valid);
      lse = &a.params.lse[vector];
    } else {
      const long long vector =
          (static_cast<long long>(destination) * a.params.h_kv + place.kv_head) * a.rows + row;
      const float scale = partial_scale(ends.magnitude[which] * factor);
      uint16_t* const partial_row = a.params.partial_out + vector * kHeadDimV;
      store_row<__half, false>(partial_row + columns, out, which, factor * scale, valid);
      PartialRow* const partial = &a.params.partial_rows[vector];
      if (speaks) *(partial->scale + half) = inverse_power(scale);
      lse = &partial->lse;
    }
    if (speaks && half == kLeftHalf) *lse = log_sum(ends.reference[which], ends.total[which]);
  }
}

}  // namespace flashmla::decode
