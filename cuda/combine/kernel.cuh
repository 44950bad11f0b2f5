// Merges the partial results of split requests: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max
// lse).
//
// A group of 8 lanes reads 128-byte lines of a split. Of at most 16 splits it merges up to four
// lines alone; more are divided among the groups of a warp, or of several. A lane asks for all it
// needs at once, before the weights are known. The order of addition is always the same, and so are
// the bits.
//
// The time is that of instructions, many of them fetched for the first time: so there are few, and
// what can be is done before the decode kernel has ended.
#pragma once

#include "warp_sum.cuh"

namespace flashmla::combine {

static_assert(schedule::kSmoothSplits == 2 * Lines<1>::kSplits);

// Few splits: a group merges kLines lines alone, a single one in two turns if need be.
template <class T, int kMostRows, int kLines>
__device__ __forceinline__ void merge_few(const Merge& merge, const Share& share, int block,
                                          int blocks) {
  constexpr int kGroups = Blocks<kMostRows>::kGroups;
  // Shares begin anywhere; neighbours agree on whose the lines are that straddle an edge.
  const int begin = schedule::ceil_div(share.begin_line, kLines) + block * kGroups;
  const int end = schedule::ceil_div(share.end_line, kLines);
#pragma unroll 1
  for (int base = begin; base < end; base += blocks * kGroups) {
    const bool valid = base + Merge::group() < end;
    const int line = (valid ? base + Merge::group() : base) * kLines;
    Lines<kLines> lines;
    if constexpr (kLines > 1) {
      lines.add(merge, line, 0, share.splits);
    } else {
#pragma unroll 1
      for (int split = 0; split < share.splits; split += Lines<1>::kSplits) {
        lines.add(merge, line, split, min(split + Lines<1>::kSplits, share.splits));
      }
    }
    const float factor = decode::inverse_sum(lines.weighing.total);
    uint32_t* const target = merge.target(line);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      uint32_t words[kLaneColumns / 2];
#pragma unroll
      for (int w = 0; w < kLaneColumns / 2; ++w) {
        words[w] = pack_pair<T>(lines.sum[l][2 * w] * factor, lines.sum[l][2 * w + 1] * factor);
      }
      if constexpr (!Blocks<kMostRows>::kFew) decode::transpose_quad(words);
      if (!valid) continue;
      reinterpret_cast<uint4*>(target)[l * kGroupLanes + Merge::lane()] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (valid && Merge::lane() == 0) merge.store_lse(line, lines.weighing);
  }
}

// Many splits: the groups of a warp divide those of a line or, if they are too many for that, the
// groups of a team of warps do.
template <class T, int kMostRows>
__device__ __forceinline__ void merge_many(const Merge& merge, const Share& share, int block,
                                           int blocks) {
  constexpr int kWarps = Blocks<kMostRows>::kWarps;
  constexpr int kSplits = Lines<1>::kSplits;
  __shared__ TeamStorage<kWarps> storage;
  int team_bits = 0;
  while (share.splits > kWarpGroups * kSplits << team_bits && 1 << team_bits < kWarps) ++team_bits;
  const int team = 1 << team_bits;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const bool first_of_team = (warp & team - 1) == 0;
  const int member = Merge::group() & kWarpGroups * team - 1;
  const int member_splits = schedule::ceil_div(share.splits, kWarpGroups * team);
  const int begin_split = member * member_splits;
  const int end_split = min(begin_split + member_splits, share.splits);
  const int lines_at_once = kWarps >> team_bits;
  const int begin = share.begin_line + block * lines_at_once;
#pragma unroll 1
  for (int base = begin; base < share.end_line; base += blocks * lines_at_once) {
    const int wanted = base + (warp >> team_bits);
    const int line = min(wanted, share.end_line - 1);
    Lines<1> lines;
#pragma unroll 1
    for (int split = begin_split; split < begin_split + member_splits; split += kSplits) {
      lines.add(merge, line, split, min(split + kSplits, end_split));
    }
    WarpSum sum(lines);
    if (team > 1) {
      storage.sums[warp][sum.pair()] = sum.sum;
      if (threadIdx.x % 32 == 0) storage.weighings[warp] = sum.weighing;
      __syncthreads();
      if (first_of_team) add_team(storage, warp, team, sum);
      if (base + blocks * lines_at_once < share.end_line) __syncthreads();
    }
    if (!first_of_team || wanted >= share.end_line) continue;
    const float factor = decode::inverse_sum(sum.weighing.total);
    const int word = Blocks<kMostRows>::kFew ? sum.pair() : decode::transposed_word(sum.pair());
    merge.target(line)[word] = pack_pair<T>(sum.sum.x * factor, sum.sum.y * factor);
    if (threadIdx.x % 32 == 0) merge.store_lse(line, sum.weighing);
  }
}

template <class T, int kMostRows>
__global__ void __launch_bounds__(Blocks<kMostRows>::kThreads, Blocks<kMostRows>::kPerSm)
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
    merge_few<T, kMostRows, 4>(merge, share, block, blocks_per_part);
  } else if (share.splits <= Lines<2>::kSplits) {
    merge_few<T, kMostRows, 2>(merge, share, block, blocks_per_part);
  } else if (share.splits <= schedule::kSmoothSplits) {
    merge_few<T, kMostRows, 1>(merge, share, block, blocks_per_part);
  } else {
    merge_many<T, kMostRows>(merge, share, block, blocks_per_part);
  }
  // So that nobody behind runs ahead. Idle parts' blocks leave, to make room for others, but for
  // the grid's first: it waits whatever the schedule holds.
  if (!share.idle || blockIdx.x == 0) sm90::wait_for_previous_kernel();
}

}  // namespace flashmla::combine
