// Online softmax over pages of transposed scores Sᵀ [64 tokens, rows]: a thread holds two tokens of
// each of its rows.
//
// Scores stay in log2 units: weight = 2^(score - reference), the reference being near the running
// row maximum. After Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "../decode/softmax.cuh"
#include "../sm90/copy.cuh"
#include "config.h"

namespace flashmla::decode_few {

using decode::kNegativeInfinity;

// The accumulator fragment of 64 x N: element i of block b of lane l of warp w is in line
// 16 w + l / 4 + 8 (i / 2), column 8 b + 2 (l % 4) + i % 2. Lines are tokens or columns of V,
// columns are query rows.
__device__ __forceinline__ int fragment_line(int which) { return decode::fragment_row(which); }
__device__ __forceinline__ int fragment_query_row(int block) {
  return decode::fragment_column(block);
}

// Of the eight lanes that hold the same query rows, the one that writes what belongs to them.
__device__ __forceinline__ bool speaks_for_rows() { return threadIdx.x % 32 < 4; }

// One value per query row of a thread: two neighbours for each block.
template <int kRows>
using RowValues = float[kRows / 8][2];

template <int kRows>
__device__ __forceinline__ void store_rows(float (&row)[kRows], const RowValues<kRows>& values) {
#pragma unroll
  for (int block = 0; block < kRows / 8; ++block) {
    *reinterpret_cast<float2*>(&row[fragment_query_row(block)]) =
        make_float2(values[block][0], values[block][1]);
  }
}

template <int kRows>
__device__ __forceinline__ void load_rows(RowValues<kRows>& values, const float (&row)[kRows]) {
#pragma unroll
  for (int block = 0; block < kRows / 8; ++block) {
    const float2 pair = *reinterpret_cast<const float2*>(&row[fragment_query_row(block)]);
    values[block][0] = pair.x;
    values[block][1] = pair.y;
  }
}

// The largest value of the lanes that share a row.
__device__ __forceinline__ float max_of_row(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
  }
  return value;
}

// What belongs to a row is found out by one lane of each warp, and the threads that hold some of
// the row ask it: each for all of its rows was up to 14% slower (32 rows, 1 x 4096; H200). A lane's
// row; lanes beyond the last have others' rows again.
template <int kRows>
__device__ __forceinline__ int lane_row() {
  return static_cast<int>(threadIdx.x % 32) % kRows;
}

// For a thread's rows, what their lanes have found out.
template <int kRows>
__device__ __forceinline__ void spread_rows(RowValues<kRows>& values, float of_lane) {
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    values[i / 2][i % 2] = __shfl_sync(~0u, of_lane, fragment_query_row(i / 2) + i % 2);
  }
}

// What all warps have of a lane's row, joined.
template <int kRows, int kWarps, class Join>
__device__ __forceinline__ float join_warps(const float (&by_warp)[kWarps][kRows], Join join) {
  float joined = by_warp[0][lane_row<kRows>()];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) joined = join(joined, by_warp[warp][lane_row<kRows>()]);
  return joined;
}
template <int kRows, int kWarps>
__device__ __forceinline__ float add_warps(const float (&by_warp)[kWarps][kRows]) {
  return join_warps(by_warp, [](float a, float b) { return a + b; });
}
template <int kRows, int kWarps>
__device__ __forceinline__ float max_warps(const float (&by_warp)[kWarps][kRows]) {
  return join_warps(by_warp, [](float a, float b) { return fmaxf(a, b); });
}

// How far, in log2 units, scores may grow beyond the reference before it moves: weights up to 2^8
// have all their bits. It moves seldom then, and the values are seldom rescaled: 0.5% with 32 rows.
inline constexpr float kMostGrowth = 8.f;

template <int kRows>
struct Softmax {
  static constexpr int kBlocks = kRows / 8;
  using Scores = float[kRows / 2];

  float reference;           // of the lane's row
  RowValues<kRows> row_sum;  // of the tokens that this thread holds

  __device__ __forceinline__ void reset() {
    reference = kNegativeInfinity;
#pragma unroll
    for (auto& pair : row_sum) pair[0] = pair[1] = 0.f;
  }

  // Largest scores of a warp's 16 tokens.
  __device__ static __forceinline__ void warp_max(const Scores& scores, RowValues<kRows>& most) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        most[block][which] =
            max_of_row(fmaxf(scores[block * 4 + which], scores[block * 4 + 2 + which]));
      }
    }
  }

  // Moves the reference of the lane's row, if it has to move for a page whose largest score is
  // `most`. factors: what earlier weights of a thread's rows are to be multiplied by. A row without
  // any key yet has none: its factor is 1.
  __device__ __forceinline__ void follow(float most, float scale, RowValues<kRows>& factors) {
    const float grown = most * scale;
    const float next = grown > reference + kMostGrowth ? grown : reference;
    const float factor =
        reference == kNegativeInfinity ? 1.f : decode::exp2_approximate(reference - next);
    reference = next;
    spread_rows<kRows>(factors, factor);
  }

  // Scores to weights.
  __device__ __forceinline__ void weigh(Scores& scores, float scale) {
    RowValues<kRows> references;
    spread_rows<kRows>(references, finite(reference));
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      scores[i] = decode::exp2_approximate(fmaf(scores[i], scale, -references[i / 4][i % 2]));
    }
  }

  // Sums a page's weights in float32, with those of before, times `factors`.
  __device__ __forceinline__ void add(const Scores& weights, const RowValues<kRows>& factors) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      float& sum = row_sum[i / 2][i % 2];
      const float* const pair = weights + i / 2 * 4 + i % 2;
      sum = fmaf(sum, factors[i / 2][i % 2], pair[0] + pair[2]);
    }
  }

  // Adds up the lanes that share a row: the sums of a warp's tokens.
  __device__ __forceinline__ void reduce_sums() {
#pragma unroll
    for (auto& pair : row_sum) {
#pragma unroll
      for (float& sum : pair) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      }
    }
  }

 private:
  // -inf - (-inf) would be NaN.
  __device__ static __forceinline__ float finite(float maximum) {
    return maximum == kNegativeInfinity ? 0.f : maximum;
  }
};

// P of a page, rounded to T, into a tile [rows][64 tokens].
template <class T, int kRows>
__device__ __forceinline__ void store_weights(uint32_t tile, const float (&weights)[kRows / 2]) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t chunk = threadIdx.x / 32 % kWarpsPerWarpgroup * 2 + lane / 8 % 2;
  const uint32_t row = lane / 16 * 8 + lane % 8;
  uint32_t pairs[kRows / 4];
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    pairs[i] = pack_pair<T>(weights[2 * i], weights[2 * i + 1]);
  }
#pragma unroll
  for (int block = 0; block + 1 < kRows / 8; block += 2) {
    sm90::store_transposed_x4(
        tile + sm90::swizzled_chunk(block * 8 + row, chunk),
        {pairs[block * 2], pairs[block * 2 + 1], pairs[block * 2 + 2], pairs[block * 2 + 3]});
  }
  if constexpr (kRows / 8 % 2 == 1) {
    sm90::store_transposed_x2(tile + sm90::swizzled_chunk(kRows - 8 + lane % 8, chunk),
                              {pairs[kRows / 4 - 2], pairs[kRows / 4 - 1]});
  }
}

}  // namespace flashmla::decode_few
