// Lines of splits, read and added up by groups of lanes.
#pragma once

#include <type_traits>

#include "../decode/epilogue.cuh"
#include "../sm90/barrier.cuh"
#include "blocks.h"
#include "share.cuh"

namespace flashmla::combine {

// A row's sum over splits so far, relative to the largest lse so far.
struct Weighing {
  float max_lse = decode::kNegativeInfinity;
  float total = 0.f;
};

// The weight of a partial result: 0 where it is empty, also if all are.
__device__ __forceinline__ float weight_of(float lse, float max_lse) {
  return lse == decode::kNegativeInfinity
             ? 0.f
             : decode::exp2_approximate((lse - max_lse) * (1.f / decode::kLn2));
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
    values_ = a.params.partial_out + first * kHeadDimV;
  }

  // A split's line, counted from the first. No GPU has memory for 2^31 of them.
  __device__ __forceinline__ unsigned place(int split, int line) const {
    return static_cast<unsigned>(split * rows_ * kRowLines + line);
  }
  // The first split's first line.
  __device__ __forceinline__ const uint16_t* values() const { return values_; }
  __device__ __forceinline__ const float4* partial_row(int split, int line) const {
    return partial_rows_ + static_cast<unsigned>(split * rows_ + line / kRowLines);
  }

  // Index of a line's row among the query vectors.
  __device__ __forceinline__ unsigned vector(int line) const {
    const int row = line / kRowLines;
    if (a_.params.h_kv == 1) return static_cast<unsigned>(share_.request * rows_ + row);
    const int kv_head = a_.by_rows.quotient(row);
    return static_cast<unsigned>(
        decode::query_vector(a_, share_.request, kv_head, row - kv_head * a_.rows));
  }
  // A line's columns in the output, as words of two.
  __device__ __forceinline__ uint32_t* target(unsigned vector, int line) const {
    const size_t row = static_cast<size_t>(vector) * (kHeadDimV / 2);
    return static_cast<uint32_t*>(a_.params.out) + row + line % kRowLines * (kLineColumns / 2);
  }
  // lse is of whole rows: the first line speaks.
  __device__ __forceinline__ void store_lse(unsigned vector, int line, const Weighing& row) const {
    if (line % kRowLines != 0) return;
    const bool empty = row.total == 0.f;
    a_.params.lse[vector] = empty ? decode::kNegativeInfinity : row.max_lse + __logf(row.total);
  }

 private:
  const decode::Arguments& a_;
  const Share& share_;
  const int rows_;  // packed rows of all KV heads: from a split's row to the next split's
  const float4* partial_rows_;
  const uint16_t* values_;
};

// Columns that a lane reads at once: kLanes lanes read a line.
template <int kLanes>
using Words = std::conditional_t<kLanes == kGroupLanes, uint4, uint2>;

// kLines neighbouring lines of a row, from up to kSplits splits at a time; a group of kLanes lanes
// has them, each lane its columns of every line. A lane asks for 128 bytes at once.
template <int kLineCount, int kLaneCount = kGroupLanes>
struct Lines {
  static constexpr int kLines = kLineCount;
  static constexpr int kLanes = kLaneCount;
  static constexpr int kSplits = kLanes / kLines;
  static constexpr int kColumns = kLineColumns / kLanes;  // of a lane
  static_assert(sizeof(Words<kLanes>) == kColumns * sizeof(__half));
  static_assert(kHeadDimV / 2 / kLineColumns % kLines == 0, "one scale for all");

  Weighing weighing;
  float sum[kLines][kColumns] = {};

  __device__ static __forceinline__ int group() { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // Adds the splits begin, …, end - 1 of a share, at most kSplits; kFirst: to nothing. As many
  // addresses as there are registers for are ready when the decode kernel ends.
  template <bool kFirst>
  __device__ __forceinline__ void add(const Merge& merge, int line, int begin, int end) {
    constexpr int kReady = kSplits <= 8 ? kSplits : 0;
    const Words<kLanes>* ready[kReady + 1];
#pragma unroll
    for (int i = 0; i < kReady; ++i) {
      ready[i] = source(merge, begin + i, line);
      pin_address(ready[i]);
    }
    const int mine = begin + lane();  // a lane has the weight of one split
    const float4* const row_source = merge.partial_row(mine, line);
    pin_address(row_source);
    sm90::wait_for_previous_kernel();
    Words<kLanes> values[kSplits][kLines];
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      const auto* const words = kReady > 0 ? ready[i] : source(merge, begin + i, line);
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        values[i][l] = begin + i < end ? __ldcg(words + l * kLanes) : Words<kLanes>{};
      }
    }
    float4 row = {decode::kNegativeInfinity, 0.f, 0.f, 0.f};
    if (lane() < kSplits && mine < end) row = __ldcg(row_source);
    const float weight = weigh<kFirst>(row.x);
    const float factor = weight * (line % kRowLines < kRowLines / 2 ? row.y : row.z);
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      add_split(values[i], __shfl_sync(~0u, factor, i, kLanes));
    }
  }

 private:
  // This lane's columns of a line of a split.
  __device__ static __forceinline__ const Words<kLanes>* source(const Merge& merge, int split,
                                                                int line) {
    return reinterpret_cast<const Words<kLanes>*>(merge.values()) + lane() +
           static_cast<size_t>(merge.place(split, line)) * kLanes;
  }

  // The weight of this lane's split.
  template <bool kFirst>
  __device__ __forceinline__ float weigh(float lse) {
    float max_lse = max_over<kLanes>(lse);
    if constexpr (!kFirst) {
      max_lse = fmaxf(weighing.max_lse, max_lse);
      rescale(weight_of(weighing.max_lse, max_lse));
    }
    const float weight = weight_of(lse, max_lse);
    weighing = {max_lse, weighing.total + sum_over<kLanes>(weight)};
    return weight;
  }

  __device__ __forceinline__ void rescale(float factor) {
    weighing.total *= factor;
#pragma unroll
    for (auto& line : sum) {
#pragma unroll
      for (float& value : line) value *= factor;
    }
  }

  __device__ __forceinline__ void add_split(const Words<kLanes> (&values)[kLines], float factor) {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const __half2* const pairs = reinterpret_cast<const __half2*>(&values[l]);
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const float2 pair = __half22float2(pairs[c / 2]);
        sum[l][c] += factor * pair.x;
        sum[l][c + 1] += factor * pair.y;
      }
    }
  }
};

}  // namespace flashmla::combine
