// Online softmax over pages, for the two rows that a thread holds of a 64-row tile.
//
// Scores stay in log2 units: weight = 2^(score - reference). A reference need not be the running
// row maximum, only near it, so it moves seldom, and weights are computed before it is known
// whether it has to. Both halves of the output go through the same references in the same page
// order; each half tells the other when its page moved them. After Milakov & Gimelshein, "Online
// normalizer calculation for softmax" (2018).
#pragma once

#include <cstdint>

#include "../pair.cuh"
#include "../sm90/wgmma.cuh"
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

// A thread's P fragment: four k-steps of 16 tokens, in the register order of a WGMMA A operand.
using Weights = uint32_t[4][4];

// Half of a page's tokens, two k-steps: what is weighed at a time.
enum TokenGroup : int { kFirstTokens, kLastTokens };

// How far, in log2 units, a new reference lies above the scores that it is made for. Weights are
// then at most 2^-headroom; the reference stays until one reaches 2. Exponents cost no accuracy
// but in float16, where small weights would become subnormal.
template <class T>
inline constexpr float kHeadroom = std::is_same_v<T, __nv_bfloat16> ? 7.f : 3.f;
// The exponent bits, of a pair in either type, that only numbers from 2 on have, infinity and NaN.
inline constexpr uint32_t kTwoOrMore = 0x4000'4000;

// What the weights of earlier pages are to be multiplied by, for a thread's two rows.
struct Rescaling {
  bool any = false;  // the same for all lanes of a warp; if not, both factors are 1
  float factor[2] = {1.f, 1.f};
};

struct Softmax {
  float reference[2] = {kNegativeInfinity, kNegativeInfinity};
  bool unset = true;  // a row of the warp has no reference; the same for all lanes
  float page_sum[2] = {0.f, 0.f};
  float row_sum[2] = {0.f, 0.f};  // of the pages this half owns; a quarter of each row per lane

  // Moves the reference to `next` and returns what earlier weights are to be multiplied by.
  __device__ __forceinline__ float follow(int which, float next) {
    const float factor =
        next == reference[which] ? 1.f : exp2_approximate(reference[which] - finite(next));
    reference[which] = next;
    row_sum[which] *= factor;
    return factor;
  }

  // A group's scores to weights by the present references, rounded to T. Returns whether these do
  // not do for this lane: a weight of 2 or more.
  template <class T>
  __device__ __forceinline__ bool weigh(TokenGroup tokens, const float (&scores)[32], float scale,
                                        Weights& weights) {
    exponentiate<T>(tokens, scores, scale, weights);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= weights[tokens * 2 + i / 4][i % 4];
    return (bits & kTwoOrMore) != 0;
  }

  // Weighs the page again, by references above all of its scores.
  template <class T>
  __device__ __forceinline__ Rescaling move(const float (&scores)[32], float scale,
                                            Weights& weights) {
    Rescaling rescaling = {true};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float above = fmaf(row_maximum(which, scores), scale, kHeadroom<T>);
      rescaling.factor[which] = follow(which, fmaxf(above, reference[which]));
    }
    note_unset();
    exponentiate<T>(kFirstTokens, scores, scale, weights);
    exponentiate<T>(kLastTokens, scores, scale, weights);
    return rescaling;
  }

  // To be called when references have moved.
  __device__ __forceinline__ void note_unset() {
    const bool none = reference[0] == kNegativeInfinity || reference[1] == kNegativeInfinity;
    unset = __any_sync(~0u, none) != 0;
  }

  // The page's weights are as they stay.
  __device__ __forceinline__ void add_page() {
#pragma unroll
    for (int which = 0; which < 2; ++which) row_sum[which] += page_sum[which];
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

  // A group's exponentials together, so that none is waited for alone.
  template <class T>
  __device__ __forceinline__ void exponentiate(TokenGroup tokens, const float (&scores)[32],
                                               float scale, Weights& weights) {
    constexpr int kGroup = 16;
    const int begin = tokens * kGroup;
    const float shift[2] = {-finite(reference[0]), -finite(reference[1])};
    if (tokens == kFirstTokens) page_sum[0] = page_sum[1] = 0.f;
    float weight[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      weight[i] = exp2_approximate(fmaf(scores[begin + i], scale, shift[i / 2 % 2]));
    }
    sm90::pin_registers(weight);
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      page_sum[i / 2 % 2] += weight[i];
      page_sum[i / 2 % 2] += weight[i + 1];
      weights[(begin + i) / 8][(begin + i) / 2 % 4] = pack_pair<T>(weight[i], weight[i + 1]);
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
