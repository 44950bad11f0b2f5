// Merges the partial results of split requests: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max
// lse).
//
// A group of 8 lanes reads 128-byte lines of a split. Where there are few splits a group takes
// several columns of them; where there are many, a team of groups divides them. Either way a lane
// asks for all it needs at once, before the weights are known. The order of addition is always the
// same, and so are the bits.
#pragma once

#include "../decode/arguments.h"
#include "../decode/softmax.cuh"
#include "../sm90/barrier.cuh"

namespace flashmla::combine {

inline constexpr int kThreads = 256;
inline constexpr int kGroupLanes = 8;
inline constexpr int kGroups = kThreads / kGroupLanes;
inline constexpr int kGroupsPerWarp = 32 / kGroupLanes;
inline constexpr int kLaneColumns = 8;  // 16 bytes
inline constexpr int kLineColumns = kGroupLanes * kLaneColumns;

// Blocks of a part, for each row tile of a KV head: together they are one wave, three to an SM.
inline constexpr int kBlocksPerTile = 3;

// Every part that has a piece of a split request merges an equal share of its rows: n splits, n
// shares. A part can have two, of the request that it begins inside of and of the one that it
// begins and does not finish.
struct Share {
  int request;
  int first_slot;
  int splits;  // 0: nothing to merge
  int index;
};
enum ShareKind : int { kOfFirstRequest, kOfLastRequest, kShareKinds };

__device__ __forceinline__ Share find_share(const decode::Arguments& a,
                                            const decode::PartRange& part, ShareKind kind) {
  const DecodeParams& p = a.params;
  const bool begins_inside = part.begin_page > 0 && part.begin_split > 0;
  const int request = kind == kOfFirstRequest ? part.begin_request : part.end_request;
  const int index = kind == kOfFirstRequest ? part.begin_split : 0;
  if (request >= p.batch) return {};
  if (kind == kOfFirstRequest && !begins_inside) return {};
  if (kind == kOfLastRequest &&
      (part.end_page <= 0 || (begins_inside && request == part.begin_request))) {
    return {};
  }
  const int before = p.num_splits[request];
  const int splits = p.num_splits[request + 1] - before;
  const int first_slot = schedule::split_slot(before, request, 0);
  const bool fits = first_slot >= 0 && splits <= 2 * p.num_sm_parts - first_slot;
  if (splits <= 1 || index >= splits || !fits) return {};
  return {request, first_slot, splits, index};
}

// Where share `index` of `shares` equal ones begins.
__device__ __forceinline__ int share_edge(int count, int index, int shares) {
  return static_cast<int>(static_cast<unsigned long long>(count) * index / shares);
}

// The merge of one share by the blocks of its part. A unit is kUnits lines of one row, one after
// another: a group of lanes takes 16 bytes of a line each.
template <class T, int kUnits>
class Merge {
 public:
  // Splits of a unit that a group reads at once.
  static constexpr int kBatch = 8 / kUnits;

  __device__ Merge(const decode::Arguments& a, const Share& share)
      : a_(a), share_(share), rows_(static_cast<long long>(a.params.h_kv) * a.rows) {
    while (team_ < kGroups && share.splits > team_ * kBatch) team_ *= 2;
    const int member = group() % team_;
    begin_split_ = share.splits * member / team_;
    end_split_ = share.splits * (member + 1) / team_;
    last_split_ = begin_split_ + schedule::ceil_div(share.splits, team_);
  }

  __device__ __forceinline__ void run(int block, int blocks) {
    const int warp_units = static_cast<int>(rows_) * kWarpUnitsPerRow;
    const int begin = share_edge(warp_units, share_.index, share_.splits) * kGroupsPerWarp;
    const int end = share_edge(warp_units, share_.index + 1, share_.splits) * kGroupsPerWarp;
    const int units_per_pass = kGroups / team_;
    sm90::wait_for_previous_kernel();
#pragma unroll 1
    for (int base = begin + block * units_per_pass; base < end; base += blocks * units_per_pass) {
      const int unit = base + group() / team_;
      const int row = unit / (kWarpUnitsPerRow * kGroupsPerWarp);
      const int in_row = unit % (kWarpUnitsPerRow * kGroupsPerWarp);
      merge_unit(row, in_row * kUnits * kLineColumns + lane() * kLaneColumns, unit < end);
    }
  }

 private:
  static constexpr int kWarpUnitsPerRow = kHeadDimV / (kLineColumns * kUnits * kGroupsPerWarp);
  static constexpr int kRowsPerLane = (kBatch + kGroupLanes - 1) / kGroupLanes;

  struct Batch {
    uint4 values[kBatch][kUnits];
    float lse[kRowsPerLane];  // lane l: of the batch's splits l, l + kGroupLanes, …
    float scale[kRowsPerLane];
  };

  // The same unit for all groups of a team; groups without one come along for the barriers.
  __device__ __forceinline__ void merge_unit(int row, int column, bool valid) {
    const int end = valid ? end_split_ : begin_split_;
    const long long first = share_.first_slot * rows_ + row;
    Batch batch = read_batch(first, column, begin_split_, end);
    float most = max_of(batch);
#pragma unroll 1
    for (int k = begin_split_ + kBatch; k < last_split_; k += kBatch) {
      read_rows(first, column, k, end, batch);
      most = fmaxf(most, max_of(batch));
    }
    const float max_lse = team_max(group_max(most));

    float total = 0.f;
    float sum[kUnits][kLaneColumns] = {};
#pragma unroll 1
    for (int k = begin_split_; k < last_split_; k += kBatch) {
      if (last_split_ - begin_split_ > kBatch) batch = read_batch(first, column, k, end);
      add_batch(batch, max_lse, sum, total);
    }
    total = group_sum(total);
    add_team(sum, total);
    if (valid && group() % team_ == 0) store(row, column, sum, total, max_lse);
  }

  __device__ __forceinline__ Batch read_batch(long long first, int column, int base,
                                              int end) const {
    Batch batch;
    const uint16_t* source = a_.params.partial_out + (first + base * rows_) * kHeadDimV + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        batch.values[i][u] = base + i < end
                                 ? __ldcg(reinterpret_cast<const uint4*>(source + u * kLineColumns))
                                 : uint4{0, 0, 0, 0};
      }
      source += rows_ * kHeadDimV;
    }
    read_rows(first, column, base, end, batch);
    return batch;
  }

  __device__ __forceinline__ void read_rows(long long first, int column, int base, int end,
                                            Batch& batch) const {
#pragma unroll
    for (int w = 0; w < kRowsPerLane; ++w) {
      const int i = w * kGroupLanes + lane();
      float4 row = {decode::kNegativeInfinity, 0.f, 0.f, 0.f};
      if (i < kBatch && base + i < end) {
        row = __ldcg(
            reinterpret_cast<const float4*>(a_.params.partial_rows + first + (base + i) * rows_));
      }
      batch.lse[w] = row.x;
      batch.scale[w] = column < kHeadDimV / 2 ? row.y : row.z;
    }
  }

  // Each lane of the group counts the weights of its splits in `total`.
  __device__ __forceinline__ static void add_batch(const Batch& batch, float max_lse,
                                                   float (&sum)[kUnits][kLaneColumns],
                                                   float& total) {
    float factors[kRowsPerLane];
#pragma unroll
    for (int w = 0; w < kRowsPerLane; ++w) {
      // 0 for empty splits, also where all are empty.
      const float weight =
          batch.lse[w] == decode::kNegativeInfinity ? 0.f : __expf(batch.lse[w] - max_lse);
      total += weight;
      factors[w] = weight * batch.scale[w];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float factor = __shfl_sync(~0u, factors[i / kGroupLanes], i % kGroupLanes, kGroupLanes);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const __half2* const pairs = reinterpret_cast<const __half2*>(&batch.values[i][u]);
#pragma unroll
        for (int c = 0; c < kLaneColumns; c += 2) {
          const float2 pair = __half22float2(pairs[c / 2]);
          sum[u][c] += factor * pair.x;
          sum[u][c + 1] += factor * pair.y;
        }
      }
    }
  }

  __device__ __forceinline__ static float max_of(const Batch& batch) {
    float most = batch.lse[0];
#pragma unroll
    for (float x : batch.lse) most = fmaxf(most, x);
    return most;
  }

  __device__ __forceinline__ static float group_max(float most) {
#pragma unroll
    for (int offset = 1; offset < kGroupLanes; offset *= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    }
    return most;
  }

  __device__ __forceinline__ static float group_sum(float value) {
#pragma unroll
    for (int offset = 1; offset < kGroupLanes; offset *= 2) {
      value += __shfl_xor_sync(~0u, value, offset);
    }
    return value;
  }

  __device__ __forceinline__ float team_max(float most) const {
    if (team_ == 1) return most;
    __shared__ float maxima[kGroups];
    if (lane() == 0) maxima[group()] = most;
    __syncthreads();
    most = maxima[group() / team_ * team_];
#pragma unroll 1
    for (int other = 1; other < team_; ++other) {
      most = fmaxf(most, maxima[group() / team_ * team_ + other]);
    }
    return most;
  }

  // The team's sums, for its first group.
  __device__ __forceinline__ void add_team(float (&sum)[kUnits][kLaneColumns], float& total) const {
    if (team_ == 1) return;
    __shared__ float sums[kGroups][kUnits * kLaneColumns + 1][kGroupLanes];
#pragma unroll
    for (int i = 0; i < kUnits * kLaneColumns; ++i) {
      sums[group()][i][lane()] = sum[i / kLaneColumns][i % kLaneColumns];
    }
    sums[group()][kUnits * kLaneColumns][lane()] = total;
    __syncthreads();
    if (group() % team_ == 0) {
#pragma unroll 1
      for (int other = group() + 1; other < group() + team_; ++other) {
#pragma unroll
        for (int i = 0; i < kUnits * kLaneColumns; ++i) {
          sum[i / kLaneColumns][i % kLaneColumns] += sums[other][i][lane()];
        }
        total += sums[other][kUnits * kLaneColumns][lane()];
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void store(int row, int column,
                                        const float (&sum)[kUnits][kLaneColumns], float total,
                                        float max_lse) const {
    const DecodeParams& p = a_.params;
    const long long vector = decode::query_vector(a_, share_.request, row / a_.rows, row % a_.rows);
    const bool empty = total == 0.f;  // NaN is not empty
    const float factor = empty ? 0.f : 1.f / total;
    T* const out = static_cast<T*>(p.out) + vector * kHeadDimV + column;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t words[kLaneColumns / 2];
#pragma unroll
      for (int w = 0; w < kLaneColumns / 2; ++w) {
        words[w] = decode::pack_pair<T>(sum[u][2 * w] * factor, sum[u][2 * w + 1] * factor);
      }
      *reinterpret_cast<uint4*>(out + u * kLineColumns) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (column == 0) {
      p.lse[vector] = empty ? decode::kNegativeInfinity : max_lse + logf(total);
    }
  }

  __device__ static __forceinline__ int group() {
    return static_cast<int>(threadIdx.x) / kGroupLanes;
  }
  __device__ static __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % kGroupLanes;
  }

  const decode::Arguments& a_;
  const Share& share_;
  const long long rows_;  // packed rows of all KV heads: from a split's row to the next split's
  int team_ = 1;          // groups that share a unit
  int begin_split_;       // of this group
  int end_split_;
  int last_split_;  // where the group with most splits would end: all take as many batches
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerTile)
    combine_kernel(const __grid_constant__ decode::Arguments a, int blocks_per_part) {
  __shared__ Share shares[kShareKinds];
  const int block = static_cast<int>(blockIdx.x) % blocks_per_part;
  // The schedule is older than the decode kernel, which waited for it.
  if (threadIdx.x < kShareKinds) {
    const auto part = decode::read_part(a, static_cast<int>(blockIdx.x) / blocks_per_part);
    shares[threadIdx.x] = find_share(a, part, static_cast<ShareKind>(threadIdx.x));
  }
  __syncthreads();
#pragma unroll 1
  for (const Share& share : shares) {
    if (share.splits == 0) continue;
    if (share.splits <= Merge<T, 2>::kBatch) {
      Merge<T, 2>(a, share).run(block, blocks_per_part);
    } else {
      Merge<T, 1>(a, share).run(block, blocks_per_part);
    }
  }
  sm90::wait_for_previous_kernel();  // of every block, so that nobody behind runs ahead
}

}  // namespace flashmla::combine
