// The sums of groups that have divided the splits of a line, added up: those of a warp by exchanges
// between lanes, those of several warps through shared memory.
#pragma once

#include "lines.cuh"

namespace flashmla::combine {

// Each exchange halves a lane's columns and the groups that a sum is spread over: afterwards a lane
// has two columns.
struct WarpSum {
  Weighing weighing;
  float2 sum;

  __device__ __forceinline__ explicit WarpSum(const Lines<1>& lines) {
    const float max_lse = max_over<32, kGroupLanes>(lines.weighing.max_lse);
    const float factor = weight_of(lines.weighing.max_lse, max_lse);
    weighing = {max_lse, sum_over<32, kGroupLanes>(lines.weighing.total * factor)};
    constexpr int kHalf = Lines<1>::kColumns / 2;
    float half[kHalf];
#pragma unroll
    for (int c = 0; c < kHalf; ++c) {
      half[c] = exchange_and_add<2 * kGroupLanes>(lines.sum[0][c] * factor,
                                                  lines.sum[0][c + kHalf] * factor);
    }
    sum = {exchange_and_add<kGroupLanes>(half[0], half[2]),
           exchange_and_add<kGroupLanes>(half[1], half[3])};
  }

  // Which two of a line's columns.
  __device__ static __forceinline__ int pair() {
    return Lines<1>::lane() * Lines<1>::kColumns / 2 + (is_upper(2 * kGroupLanes) ? 2 : 0) +
           (is_upper(kGroupLanes) ? 1 : 0);
  }

 private:
  __device__ static __forceinline__ bool is_upper(int lanes) { return threadIdx.x & lanes; }

  // Of two columns, the upper one of two lanes adds up the high one.
  template <int kLanes>
  __device__ static __forceinline__ float exchange_and_add(float low, float high) {
    const bool upper = is_upper(kLanes);
    return (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kLanes);
  }
};

// What the warps of a line found.
template <int kWarps>
struct TeamStorage {
  float2 sums[kWarps][kLineColumns / 2];
  Weighing weighings[kWarps];
};

// The sums of a line's warps first, ..., first + team - 1 added up by the first of them. A team is
// a power of two, and more than one.
template <int kWarps>
__device__ __forceinline__ void add_team(const TeamStorage<kWarps>& storage, int first, int team,
                                         WarpSum& warp) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Weighing mine;
  if (lane < team) mine = storage.weighings[first + lane];
  const float max_lse = max_over<kWarps>(mine.max_lse);
  const float weight = weight_of(mine.max_lse, max_lse);
  warp.weighing = {__shfl_sync(~0u, max_lse, 0),
                   __shfl_sync(~0u, sum_over<kWarps>(weight * mine.total), 0)};
  warp.sum = {0.f, 0.f};
#pragma unroll 1
  for (int member = 0; member < team; member += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = __shfl_sync(~0u, weight, member + i);
      const float2 pair = storage.sums[first + member + i][warp.pair()];
      warp.sum.x += factor * pair.x;
      warp.sum.y += factor * pair.y;
    }
  }
}

}  // namespace flashmla::combine
