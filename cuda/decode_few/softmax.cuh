// Online softmax over pages of transposed scores Sᵀ [64 tokens, rows]: a thread holds two tokens of
// each of its rows.
//
// Scores stay in log2 units: weight = 2^(score - reference), the reference being the running row
// maximum. After Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
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

// One value for each row of the four warps' values.
template <int kRows, class Join>
__device__ __forceinline__ void join_warps(const float (&by_warp)[kWarpsPerWarpgroup][kRows],
                                           RowValues<kRows>& joined, Join join) {
  load_rows<kRows>(joined, by_warp[0]);
#pragma unroll
  for (int warp = 1; warp < kWarpsPerWarpgroup; ++warp) {
    RowValues<kRows> theirs;
    load_rows<kRows>(theirs, by_warp[warp]);
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      joined[i / 2][i % 2] = join(joined[i / 2][i % 2], theirs[i / 2][i % 2]);
    }
  }
}

template <int kRows>
__device__ __forceinline__ void add_warps(const float (&by_warp)[kWarpsPerWarpgroup][kRows],
                                          RowValues<kRows>& sum) {
  join_warps<kRows>(by_warp, sum, [](float a, float b) { return a + b; });
}
template <int kRows>
__device__ __forceinline__ void max_warps(const float (&by_warp)[kWarpsPerWarpgroup][kRows],
                                          RowValues<kRows>& most) {
  join_warps<kRows>(by_warp, most, [](float a, float b) { return fmaxf(a, b); });
}

template <int kRows>
struct Softmax {
  static constexpr int kBlocks = kRows / 8;
  using Scores = float[kRows / 2];

  RowValues<kRows> row_max;
  RowValues<kRows> row_sum;  // of the tokens that this thread holds

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        row_max[block][which] = kNegativeInfinity;
        row_sum[block][which] = 0.f;
      }
    }
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

  // Moves the references on to a page whose largest scores are `most`; factors: what earlier
  // weights are to be multiplied by. A row without any key yet has none: its factor is 1.
  __device__ __forceinline__ void grow(const RowValues<kRows>& most, float scale,
                                       RowValues<kRows>& factors) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        float& reference = row_max[block][which];
        const float next = fmaxf(reference, most[block][which] * scale);
        const float factor = decode::exp2_approximate(reference - next);
        factors[block][which] = reference == kNegativeInfinity ? 1.f : factor;
        row_sum[block][which] *= factors[block][which];
        reference = next;
      }
    }
  }

  // Scores to weights, summed in float32.
  __device__ __forceinline__ void weigh(Scores& scores, float scale) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const float reference = finite(row_max[i / 4][i % 2]);
      scores[i] = decode::exp2_approximate(fmaf(scores[i], scale, -reference));
      row_sum[i / 4][i % 2] += scores[i];
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
