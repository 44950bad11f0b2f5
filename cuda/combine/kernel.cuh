// Merges the partial results of split requests: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max
// lse).
//
// A group of lanes reads 128-byte lines of splits: 8 lanes those of at most 8 splits, 16 lanes
// those of at most 16. Of so many it merges a line or two alone; more are divided among the groups
// of a warp, or of several. A lane asks for all it needs at once, before the weights are known. The
// order of addition is always the same, and so are the bits.
//
// The time is that of instructions, many of them fetched for the first time: so there are few, and
// what can be is done before the decode kernel has ended. The code of both kernels has to fit the
// SM's instruction cache: 10 KB more here make rows that never run them 2% slower (H200).
#pragma once

#include "warp_sum.cuh"

namespace flashmla::combine {

static_assert(schedule::kSmoothSplits == Lines<1, 16>::kSplits);

// A lane's words of a line to their places. Splits of row tiles have their columns as fragments
// have them: lanes that have four words swap them first.
template <bool kInOrder, int kWords>
__device__ __forceinline__ void store_words(uint32_t* line, uint32_t (&words)[kWords], int lane,
                                            bool valid) {
  if constexpr (kWords == 4) {
    if constexpr (!kInOrder) decode::transpose_quad(words);
    if (valid) {
      reinterpret_cast<uint4*>(line)[lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  } else if (valid) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int place = lane * kWords + w;
      line[kInOrder ? place : decode::transposed_word(place)] = words[w];
    }
  }
}

// Few splits: a Group of lanes merges its lines alone.
template <class T, int kMostRows, class Group>
__device__ __forceinline__ void merge_few(const Merge& merge, const Share& share, int block,
                                          int blocks) {
  constexpr int kLines = Group::kLines;
  constexpr int kGroups = Blocks<kMostRows>::kThreads / Group::kLanes;
  // Shares begin anywhere; neighbours agree on whose the lines are that straddle an edge.
  const int begin = schedule::ceil_div(share.begin_line, kLines) + block * kGroups;
  const int end = schedule::ceil_div(share.end_line, kLines);
#pragma unroll 1
  for (int base = begin; base < end; base += blocks * kGroups) {
    const bool valid = base + Group::group() < end;
    const int line = (valid ? base + Group::group() : base) * kLines;
    Group lines;
    lines.template add<true>(merge, line, 0, share.splits);
    const float factor = decode::inverse_sum(lines.weighing.total);
    const unsigned vector = merge.vector(line);
    uint32_t* const target = merge.target(vector, line);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      uint32_t words[Group::kColumns / 2];
#pragma unroll
      for (int w = 0; w < Group::kColumns / 2; ++w) {
        words[w] = pack_pair<T>(lines.sum[l][2 * w] * factor, lines.sum[l][2 * w + 1] * factor);
      }
      store_words<Blocks<kMostRows>::kFew>(target + l * (kLineColumns / 2), words, Group::lane(),
                                           valid);
    }
    if (valid && Group::lane() == 0) merge.store_lse(vector, line, lines.weighing);
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
  const int member = Lines<1>::group() & kWarpGroups * team - 1;
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
      lines.template add<false>(merge, line, split, min(split + kSplits, end_split));
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
    const unsigned vector = merge.vector(line);
    merge.target(vector, line)[word] = pack_pair<T>(sum.sum.x * factor, sum.sum.y * factor);
    if (threadIdx.x % 32 == 0) merge.store_lse(vector, line, sum.weighing);
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
  } else if (share.splits <= Lines<2>::kSplits) {
    merge_few<T, kMostRows, Lines<2>>(merge, share, block, blocks_per_part);
  } else if (share.splits <= Lines<1>::kSplits) {
    merge_few<T, kMostRows, Lines<1>>(merge, share, block, blocks_per_part);
  } else if (share.splits <= Lines<1, 16>::kSplits) {
    merge_few<T, kMostRows, Lines<1, 16>>(merge, share, block, blocks_per_part);
  } else {
    merge_many<T, kMostRows>(merge, share, block, blocks_per_part);
  }
  // So that nobody behind runs ahead. Idle parts' blocks leave, to make room for others, but for
  // the grid's first: it waits whatever the schedule holds.
  if (!share.idle || blockIdx.x == 0) sm90::wait_for_previous_kernel();
}

}  // namespace flashmla::combine
