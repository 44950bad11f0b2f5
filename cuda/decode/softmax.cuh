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

// How far, in log2 units, a row's scores may exceed its reference before the reference moves.
// Weights up to 2^8 lose no accuracy, and moving seldom lets the weights be computed beside the
// maximum instead of after it, and O stay as it is.
inline constexpr float kReferenceSlack = 8.f;

struct Softmax {
  float reference[2] = {kNegativeInfinity, kNegativeInfinity};
  float row_sum[2] = {0.f, 0.f};  // of the pages this half owns; a quarter of each row per lane

  // Moves the reference to `next` and returns what earlier weights are to be multiplied by.
  __device__ __forceinline__ float follow(int which, float next) {
    const float factor =
        next == reference[which] ? 1.f : exp2_approximate(reference[which] - finite(next));
    reference[which] = next;
    row_sum[which] *= factor;
    return factor;
  }

  // Scores to weights, summed in float32 and rounded to T. Sets what earlier weights are to be
  // multiplied by.
  template <class T>
  __device__ __forceinline__ void weigh(const float (&scores)[32], float scale, Weights& weights,
                                        bool first_page, float (&factor)[2]) {
    float sum[2];
    if (!first_page) exponentiate<T>(scores, scale, weights, sum);
    float next[2];
    bool grows = first_page;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      next[which] = row_maximum(which, scores) * scale;
      if (!(next[which] > reference[which] + kReferenceSlack)) next[which] = reference[which];
      grows |= next[which] != reference[which];
      factor[which] = 1.f;
    }
    if (__any_sync(~0u, grows)) {
#pragma unroll
      for (int which = 0; which < 2; ++which) factor[which] = follow(which, next[which]);
      exponentiate<T>(scores, scale, weights, sum);
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) row_sum[which] += sum[which];
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
  __device__ static __forceinline__ float row_maximum(int which, const float (&scores)[32]) {
    float most = kNegativeInfinity;
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      most = fmaxf(most, fmaxf(scores[block * 4 + which * 2], scores[block * 4 + which * 2 + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    return fmaxf(most, __shfl_xor_sync(~0u, most, 2));
  }

  template <class T>
  __device__ __forceinline__ void exponentiate(const float (&scores)[32], float scale,
                                               Weights& weights, float (&sum)[2]) const {
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int which = i / 2 % 2;
      const float shift = -finite(reference[which]);
      const float low = exp2_approximate(fmaf(scores[i], scale, shift));
      const float high = exp2_approximate(fmaf(scores[i + 1], scale, shift));
      sum[which] += low;
      sum[which] += high;
      weights[i / 8][i / 2 % 4] = pack_pair<T>(low, high);
    }
  }

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
