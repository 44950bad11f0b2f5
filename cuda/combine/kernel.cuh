// Merges the partial results of split requests: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max
// lse).
//
// A group of 8 lanes reads 128-byte lines of a split. Of at most 8 splits it merges up to four
// lines alone; more splits are divided among a team of groups, whose sums meet in shared memory. A
// lane asks for all it needs at once, before the weights are known. The order of addition is always
// the same, and so are the bits.
//
// The time is that of instructions, many of them fetched for the first time: so there are few, and
// what can be is done before the decode kernel has ended.
#pragma once

#include "../decode/epilogue.cuh"
#include "../sm90/barrier.cuh"
#include "share.cuh"

namespace flashmla::combine {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kGroupLanes = 8;
inline constexpr int kGroups = kThreads / kGroupLanes;
inline constexpr int kLaneColumns = kLineColumns / kGroupLanes;  // 16 bytes
inline constexpr int kLoads = 8;  // 16-byte loads that a lane has in flight

// Three blocks to an SM, so that those of all parts are one wave.
inline constexpr int kMostBlocksPerTile = 3;

// Blocks of a part, for each row tile of a KV head. Where there is work for one, one: the blocks
// of all parts then start on the SMs that the decode kernel leaves first, and none behind its last.
FLASHMLA_HOST_DEVICE constexpr int blocks_per_tile(bool few) {
  return few ? 1 : kMostBlocksPerTile;
}

// A row's sum over splits so far, relative to the largest lse so far.
struct Weighing {
  float max_lse = decode::kNegativeInfinity;
  float total = 0.f;
};

// The weight of a partial result: 0 where it is empty, also if all are.
__device__ __forceinline__ float weight_of(float lse, float max_lse) {
  return lse == decode::kNegativeInfinity ? 0.f : __expf(lse - max_lse);
}

template <int kLanes>
__device__ __forceinline__ float max_over(float value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

template <int kLanes>
__device__ __forceinline__ float sum_over(float value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
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

  // Whether a line's columns are in order, or as decode's epilogue stores them.
  __device__ __forceinline__ bool in_order() const { return a_.few; }

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

// Few splits: a group merges kLines lines alone.
template <class T, int kLines>
__device__ __forceinline__ void merge_few(const Merge& merge, const Share& share, int block,
                                          int blocks) {
  // Shares begin anywhere; neighbours agree on whose the lines are that straddle an edge.
  const int begin = schedule::ceil_div(share.begin_line, kLines) + block * kGroups;
  const int end = schedule::ceil_div(share.end_line, kLines);
#pragma unroll 1
  for (int base = begin; base < end; base += blocks * kGroups) {
    const bool valid = base + Merge::group() < end;
    const int line = (valid ? base + Merge::group() : base) * kLines;
    Lines<kLines> lines;
    lines.add(merge, line, 0, share.splits);
    const float factor = decode::inverse_sum(lines.weighing.total);
    uint32_t* const target = merge.target(line);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      uint32_t words[kLaneColumns / 2];
#pragma unroll
      for (int w = 0; w < kLaneColumns / 2; ++w) {
        words[w] =
            decode::pack_pair<T>(lines.sum[l][2 * w] * factor, lines.sum[l][2 * w + 1] * factor);
      }
      if (!merge.in_order()) decode::transpose_quad(words);
      if (!valid) continue;
      reinterpret_cast<uint4*>(target)[l * kGroupLanes + Merge::lane()] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (valid && Merge::lane() == 0) merge.store_lse(line, lines.weighing);
  }
}

// What the members of the teams found.
struct TeamStorage {
  alignas(16) float sums[kGroups][kLineColumns];
  Weighing weighings[kGroups];
};

// The members' sums of a line, added up by a warp: a lane for two columns.
template <class T>
__device__ __forceinline__ void merge_team(const TeamStorage& storage, int first, int team,
                                           const Merge& merge, int line) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  Weighing mine;
  if (lane < team) mine = storage.weighings[first + lane];
  const float max_lse = max_over<32>(mine.max_lse);
  const float weight = weight_of(mine.max_lse, max_lse);
  const Weighing row = {max_lse, sum_over<32>(weight * mine.total)};
  float2 sum = {0.f, 0.f};
  // A team is a power of two, and more than one.
#pragma unroll 1
  for (int member = 0; member < team; member += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float factor = __shfl_sync(~0u, weight, member + i);
      const float2 pair = reinterpret_cast<const float2*>(storage.sums[first + member + i])[lane];
      sum.x += factor * pair.x;
      sum.y += factor * pair.y;
    }
  }
  const float factor = decode::inverse_sum(row.total);
  const int word = merge.in_order() ? lane : decode::transposed_word(lane);
  merge.target(line)[word] = decode::pack_pair<T>(sum.x * factor, sum.y * factor);
  if (lane == 0) merge.store_lse(line, row);
}

// Many splits: teams divide those of a line.
template <class T>
__device__ __forceinline__ void merge_many(const Merge& merge, const Share& share, int block,
                                           int blocks) {
  constexpr int kSplits = Lines<1>::kSplits;
  __shared__ TeamStorage storage;
  int team_bits = 1;
  while (share.splits > kSplits << team_bits && 1 << team_bits < kGroups) ++team_bits;
  const int team = 1 << team_bits;
  const int lines_at_once = kGroups >> team_bits;
  const int line_here = Merge::group() >> team_bits;
  const int turns_splits = (share.splits + team - 1) >> team_bits;  // of each member
  const int begin_split = (Merge::group() & team - 1) * turns_splits;
  const int end_split = min(begin_split + turns_splits, share.splits);
  const int begin = share.begin_line + block * lines_at_once;
#pragma unroll 1
  for (int base = begin; base < share.end_line; base += blocks * lines_at_once) {
    Lines<1> lines;
#pragma unroll 1
    for (int split = begin_split; split < begin_split + turns_splits; split += kSplits) {
      lines.add(merge, min(base + line_here, share.end_line - 1), split,
                min(split + kSplits, end_split));
    }
    float4* const mine =
        reinterpret_cast<float4*>(storage.sums[Merge::group()]) + 2 * Merge::lane();
    mine[0] = make_float4(lines.sum[0][0], lines.sum[0][1], lines.sum[0][2], lines.sum[0][3]);
    mine[1] = make_float4(lines.sum[0][4], lines.sum[0][5], lines.sum[0][6], lines.sum[0][7]);
    if (Merge::lane() == 0) storage.weighings[Merge::group()] = lines.weighing;
    __syncthreads();
    const int line_count = min(lines_at_once, share.end_line - base);
#pragma unroll 1
    for (int line = static_cast<int>(threadIdx.x) / 32; line < line_count; line += kWarps) {
      merge_team<T>(storage, line << team_bits, team, merge, base + line);
    }
    if (base + blocks * lines_at_once < share.end_line) __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMostBlocksPerTile)
    combine_kernel(const __grid_constant__ decode::Arguments a, int blocks_per_part) {
  sm90::allow_next_kernel();
  const int part = static_cast<int>(blockIdx.x) / blocks_per_part;
  const int block = static_cast<int>(blockIdx.x) - part * blocks_per_part;
  // The schedule is older than the decode kernel, which waited for it.
  const Share share = find_share(a, part, a.params.h_kv * a.rows * kRowLines);
  const Merge merge(a, share);
  if (share.empty()) {
    // nothing to do
  } else if (share.splits <= Lines<4>::kSplits) {
    merge_few<T, 4>(merge, share, block, blocks_per_part);
  } else if (share.splits <= Lines<2>::kSplits) {
    merge_few<T, 2>(merge, share, block, blocks_per_part);
  } else if (share.splits <= Lines<1>::kSplits) {
    merge_few<T, 1>(merge, share, block, blocks_per_part);
  } else {
    merge_many<T>(merge, share, block, blocks_per_part);
  }
  sm90::wait_for_previous_kernel();  // every block, so that nobody behind runs ahead
}

}  // namespace flashmla::combine
