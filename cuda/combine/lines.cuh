// Lines of splits, read and added up by groups of lanes.
#pragma once

#include "../decode/epilogue.cuh"
#include "../sm90/barrier.cuh"
#include "blocks.h"
#include "share.cuh"

namespace flashmla::combine {

inline constexpr int kLaneColumns = kLineColumns / kGroupLanes;  // 16 bytes
inline constexpr int kLoads = 8;  // 16-byte loads that a lane has in flight

// A row's sum over splits so far, relative to the largest lse so far.
struct Weighing {
  float max_lse = decode::kNegativeInfinity;
  float total = 0.f;
};

// The weight of a partial result: 0 where it is empty, also if all are.
__device__ __forceinline__ float weight_of(float lse, float max_lse) {
  return lse == decode::kNegativeInfinity ? 0.f : __expf(lse - max_lse);
}

template <int kLanes, int kStep = 1>
__device__ __forceinline__ float max_over(float value) {
#pragma unroll
  for (int offset = kStep; offset < kLanes; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

template <int kLanes, int kStep = 1>
__device__ __forceinline__ float sum_over(float value) {
#pragma unroll
  for (int offset = kStep; offset < kLanes; offset *= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

// The compiler would compute it where it is used.
__device__ __forceinline__ void pin_address(const void* address) {
  asm volatile("" ::"l"(address));
}

// A share's data, as one thread of it sees them.
class Merge {
 public:
  __device__ __forceinline__ Merge(const decode::Arguments& a, const Share& share)
      : a_(a), share_(share), rows_(a.params.h_kv * a.rows) {
    const long long first = static_cast<long long>(share.first_slot) * rows_;
    partial_rows_ = reinterpret_cast<const float4*>(a.params.partial_rows) + first;
    values_ = reinterpret_cast<const uint4*>(a.params.partial_out + first * kHeadDimV) + lane();
  }

  // This lane's 16 bytes of a line of a split.
  __device__ __forceinline__ const uint4* values(int split, int line) const {
    const long long offset = static_cast<long long>(split) * rows_ * kRowLines + line;
    return values_ + offset * kGroupLanes;
  }
  __device__ __forceinline__ const float4* partial_row(int split, int line) const {
    return partial_rows_ + static_cast<long long>(split) * rows_ + line / kRowLines;
  }

  // Index of a line's row among the query vectors.
  __device__ __forceinline__ long long vector(int line) const {
    const int row = line / kRowLines;
    if (a_.params.h_kv == 1) return static_cast<long long>(share_.request) * rows_ + row;
    return decode::query_vector(a_, share_.request, row / a_.rows, row % a_.rows);
  }
  // A line's columns in the output, as words of two.
  __device__ __forceinline__ uint32_t* target(int line) const {
    const long long first = vector(line) * kHeadDimV + line % kRowLines * kLineColumns;
    return reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a_.params.out) + first);
  }
  // lse is of whole rows: the first line speaks.
  __device__ __forceinline__ void store_lse(int line, const Weighing& row) const {
    if (line % kRowLines != 0) return;
    const bool empty = row.total == 0.f;
    a_.params.lse[vector(line)] =
        empty ? decode::kNegativeInfinity : row.max_lse + __logf(row.total);
  }

  __device__ static __forceinline__ int group() {
    return static_cast<int>(threadIdx.x) / kGroupLanes;
  }
  __device__ static __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % kGroupLanes;
  }

 private:
  const decode::Arguments& a_;
  const Share& share_;
  const int rows_;  // packed rows of all KV heads: from a split's row to the next split's
  const float4* partial_rows_;
  const uint4* values_;
};

// kLines neighbouring lines of a row, from up to kSplits splits at a time; a group of lanes has
// them, each lane 8 columns of a line.
template <int kLines>
struct Lines {
  static constexpr int kSplits = kLoads / kLines;
  static_assert(kSplits <= kGroupLanes, "a lane for each split's weight");
  static_assert(kHeadDimV / 2 / kLineColumns % kLines == 0, "one scale for all");

  Weighing weighing;
  float sum[kLines][kLaneColumns] = {};

  // Adds the splits begin, …, end - 1 of a share, at most kSplits. All addresses are known when the
  // decode kernel ends.
  __device__ __forceinline__ void add(const Merge& merge, int line, int begin, int end) {
    const uint4* sources[kSplits];
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      sources[i] = merge.values(begin + i, line);
      pin_address(sources[i]);
    }
    const int mine = begin + Merge::lane();  // a lane has the weight of one split
    const float4* const row_source = merge.partial_row(mine, line);
    pin_address(row_source);
    sm90::wait_for_previous_kernel();
    uint4 values[kSplits][kLines];
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        values[i][l] = begin + i < end ? __ldcg(sources[i] + l * kGroupLanes) : uint4{0, 0, 0, 0};
      }
    }
    float4 row = {decode::kNegativeInfinity, 0.f, 0.f, 0.f};
    if (Merge::lane() < kSplits && mine < end) row = __ldcg(row_source);
    const float max_lse = fmaxf(weighing.max_lse, max_over<kGroupLanes>(row.x));
    const float weight = weight_of(row.x, max_lse);
    rescale(weight_of(weighing.max_lse, max_lse));
    weighing = {max_lse, weighing.total + sum_over<kGroupLanes>(weight)};
    const float factor = weight * (line % kRowLines < kRowLines / 2 ? row.y : row.z);
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      add_split(values[i], __shfl_sync(~0u, factor, i, kGroupLanes));
    }
  }

 private:
  __device__ __forceinline__ void rescale(float factor) {
    weighing.total *= factor;
#pragma unroll
    for (auto& line : sum) {
#pragma unroll
      for (float& value : line) value *= factor;
    }
  }

  __device__ __forceinline__ void add_split(const uint4 (&values)[kLines], float factor) {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const __half2* const pairs = reinterpret_cast<const __half2*>(&values[l]);
#pragma unroll
      for (int c = 0; c < kLaneColumns; c += 2) {
        const float2 pair = __half22float2(pairs[c / 2]);
        sum[l][c] += factor * pair.x;
        sum[l][c + 1] += factor * pair.y;
      }
    }
  }
};

}  // namespace flashmla::combine
