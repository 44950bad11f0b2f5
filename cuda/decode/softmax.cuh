// Online softmax over pages, for the two rows that a thread holds of a 64-row tile.
//
// Scores stay in log2 units: weight = 2^(score - reference), the reference being the running row
// maximum. Both halves of the output go through the same references in the same page order, so
// each half tells the other its page's new maximum and nothing else. After Milakov & Gimelshein,
// "Online normalizer calculation for softmax" (2018).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "config.h"

namespace flashmla::decode {

inline constexpr float kNegativeInfinity = -__builtin_huge_valf();
inline constexpr float kLn2 = 0.6931471805599453f;

// The accumulator fragment: lane l of warp w holds rows 16 w + l / 4 and 8 further down, and of
// every block of 8 columns the two columns 2 (l % 4) and the next.
__device__ __forceinline__ int fragment_row(int which) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32) % kWarpsPerWarpgroup;
  return warp * 16 + lane / 4 + which * 8;
}
__device__ __forceinline__ int fragment_column(int block) {
  return block * 8 + static_cast<int>(threadIdx.x % 4) * 2;
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// A thread's P fragment: four k-steps of 16 tokens, in the register order of a WGMMA A operand.
using Weights = uint32_t[4][4];

struct Softmax {
  float row_max[2] = {kNegativeInfinity, kNegativeInfinity};
  float row_sum[2] = {0.f, 0.f};  // of the pages this half owns; a quarter of each row per lane

  // Moves the reference to `next` and returns what earlier weights are to be multiplied by.
  __device__ __forceinline__ float follow(int which, float next) {
    const float factor = exp2_approximate(row_max[which] - finite(next));
    row_max[which] = next;
    row_sum[which] *= factor;
    return factor;
  }

  // The reference after a page with these scores.
  __device__ __forceinline__ float grown(int which, const float (&scores)[32], float scale) const {
    float most = kNegativeInfinity;
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      most = fmaxf(most, fmaxf(scores[block * 4 + which * 2], scores[block * 4 + which * 2 + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    return fmaxf(row_max[which], most * scale);
  }

  // Scores to weights, summed in float32 and rounded to T.
  template <class T>
  __device__ __forceinline__ void weigh(float (&scores)[32], float scale, Weights& weights) {
    const float reference[2] = {finite(row_max[0]), finite(row_max[1])};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int which = i / 2 % 2;
      scores[i] = exp2_approximate(fmaf(scores[i], scale, -reference[which]));
      row_sum[which] += scores[i];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      weights[i / 4][i % 4] = pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }
  }

  // Adds up the lanes that share a row.
  __device__ __forceinline__ void reduce_sums() {
#pragma unroll
    for (float& sum : row_sum) {
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    }
  }

 private:
  // A row without any key yet has no maximum: -inf - (-inf) would be NaN.
  __device__ static __forceinline__ float finite(float maximum) {
    return maximum == kNegativeInfinity ? 0.f : maximum;
  }
};

// Keys from `limit` on are invisible; a row of the fragment has its own limit.
__device__ __forceinline__ void mask_scores(float (&scores)[32], int first_key,
                                            const int (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int key = first_key + fragment_column(i / 4) + i % 2;
    if (key >= limit[i / 2 % 2]) scores[i] = kNegativeInfinity;
  }
}

}  // namespace flashmla::decode
