// Merges the partial results of split requests: out = Σ w_k O_k / Σ w_k, w_k = exp(lse_k - max
// lse).
//
// A part that begins inside a request takes a share of that request's rows: n splits have n - 1
// such parts, so the work is spread evenly and the grid does not depend on the batch; blocks of
// parts that begin with a whole request leave at once. The unit of work is half a row (256
// columns). It is done by a team of warps that divide the splits: one warp for few splits, a block
// for many. The order is always the same, and so are the bits.
#pragma once

#include "../decode/arguments.h"
#include "../decode/softmax.cuh"
#include "../sm90/barrier.cuh"

namespace flashmla::combine {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBatch = 8;    // splits of a unit that a warp reads at once
inline constexpr int kVectors = 2;  // float4 per lane
inline constexpr int kUnitColumns = kVectors * 32 * 4;
inline constexpr int kUnitsPerRow = kHeadDimV / kUnitColumns;

// Blocks per part: one unit per warp in a share that is a whole request's rows, up to a limit. Two
// blocks fit an SM, so more would only queue up, also where nothing is split and all leave at once.
inline constexpr int kMostBlocksPerPart = 8;

inline long long blocks_per_part(long long rows) {
  const long long blocks = (rows * kUnitsPerRow + kWarps - 1) / kWarps;
  return blocks < kMostBlocksPerPart ? blocks : kMostBlocksPerPart;
}

// Warps that share a unit.
__device__ __forceinline__ int team_size(int splits) {
  return splits > 4 * kBatch ? 8 : splits > 2 * kBatch ? 4 : splits > kBatch ? 2 : 1;
}

struct Share {
  int request;
  int first_slot;
  int splits;
  int begin_row;  // of the request's h_kv * rows packed rows
  int end_row;
};

// What this part merges; splits == 0: nothing.
__device__ __forceinline__ Share find_share(const decode::Arguments& a, int part_index) {
  const DecodeParams& p = a.params;
  const decode::PartRange part = decode::read_part(a, part_index);
  const int request = part.begin_request;
  if (request >= p.batch || part.begin_page <= 0 || part.begin_split <= 0) return {};
  const int before = p.num_splits[request];
  const int splits = p.num_splits[request + 1] - before;
  const int first_slot = schedule::split_slot(before, request, 0);
  const bool fits = first_slot >= 0 && splits <= 2 * p.num_sm_parts - first_slot;
  if (splits <= 1 || part.begin_split >= splits || !fits) return {};
  const long long rows = static_cast<long long>(p.h_kv) * a.rows;
  const int shares = splits - 1;
  const auto edge = [&](int share) { return static_cast<int>(rows * share / shares); };
  return {request, first_slot, splits, edge(part.begin_split - 1), edge(part.begin_split)};
}

__device__ __forceinline__ float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// The weighted sum of some splits of a unit. In one lane: vector v is columns 128 v + 4 lane and
// the next three.
struct UnitSum {
  float4 values[kVectors] = {};
  float max_lse = decode::kNegativeInfinity;
  float weight = 0.f;  // Σ exp(lse - max_lse)

  // Raises the reference to `lse`; what is there shrinks accordingly.
  __device__ __forceinline__ void raise(float lse) {
    if (lse <= max_lse) return;
    const float factor = __expf(max_lse - lse);
    weight *= factor;
    for (float4& v : values) v = {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
    max_lse = lse;
  }

  __device__ __forceinline__ void add(float factor, const float4 (&other)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      values[v].x += factor * other[v].x;
      values[v].y += factor * other[v].y;
      values[v].z += factor * other[v].z;
      values[v].w += factor * other[v].w;
    }
  }

  // exp(lse - max_lse); 0 for empty splits, also while all were empty.
  __device__ __forceinline__ float weight_of(float lse) const {
    return lse == decode::kNegativeInfinity ? 0.f : __expf(lse - max_lse);
  }

  __device__ __forceinline__ void merge(const UnitSum& other) {
    raise(other.max_lse);
    const float factor = weight_of(other.max_lse);
    weight += factor * other.weight;
    add(factor, other.values);
  }
};

// Splits [begin, end) of a unit; neighbouring splits are `stride` rows apart. The values of a batch
// are requested before the weights are known.
__device__ __forceinline__ UnitSum sum_splits(const float* lse, const float* values,
                                              long long stride, int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  UnitSum sum;
  for (int base = begin; base < end; base += kBatch) {
    const int count = min(kBatch, end - base);
    const float mine =
        lane < count ? __ldcg(lse + (base + lane) * stride) : decode::kNegativeInfinity;
    float4 read[kBatch][kVectors];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float* const source = values + (base + i) * stride * kHeadDimV + lane * 4;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        read[i][v] = i < count ? __ldcg(reinterpret_cast<const float4*>(source + v * 128))
                               : float4{0.f, 0.f, 0.f, 0.f};
      }
    }
    sum.raise(warp_max(mine));
    const float weight = sum.weight_of(mine);
    sum.weight += warp_sum(weight);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum.add(__shfl_sync(~0u, weight, i), read[i]);
  }
  return sum;
}

template <class T>
__device__ __forceinline__ void store_unit(const DecodeParams& p, long long vector, int column,
                                           const UnitSum& sum) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool empty = sum.weight == 0.f;  // NaN is not empty
  const float factor = empty ? 0.f : 1.f / sum.weight;
  T* const out = static_cast<T*>(p.out) + vector * kHeadDimV + column + lane * 4;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float4& x = sum.values[v];
    *reinterpret_cast<uint2*>(out + v * 128) =
        make_uint2(decode::pack_pair<T>(x.x * factor, x.y * factor),
                   decode::pack_pair<T>(x.z * factor, x.w * factor));
  }
  if (column == 0 && lane == 0) {
    p.lse[vector] = empty ? decode::kNegativeInfinity : sum.max_lse + logf(sum.weight);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ decode::Arguments a, int blocks_per_part) {
  __shared__ UnitSum team_sums[kWarps][32];
  sm90::wait_for_previous_kernel();
  const DecodeParams& p = a.params;
  const int block = static_cast<int>(blockIdx.x) % blocks_per_part;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Share share = find_share(a, static_cast<int>(blockIdx.x) / blocks_per_part);
  const int team = team_size(share.splits);
  const int member = warp % team;
  const int begin_split = share.splits * member / team;
  const int end_split = share.splits * (member + 1) / team;
  const int end_unit = share.end_row * kUnitsPerRow;
  const int step = blocks_per_part * (kWarps / team);
  const long long stride = static_cast<long long>(p.h_kv) * a.rows;

  for (int base = share.begin_row * kUnitsPerRow + block * (kWarps / team); base < end_unit;
       base += step) {
    const int unit = base + warp / team;
    const int row = unit / kUnitsPerRow;
    const int column = unit % kUnitsPerRow * kUnitColumns;
    UnitSum sum;
    if (unit < end_unit) {
      const long long first = share.first_slot * stride + row;
      sum = sum_splits(p.partial_lse + first, p.partial_out + first * kHeadDimV + column, stride,
                       begin_split, end_split);
    }
    if (team > 1) {
      team_sums[warp][lane] = sum;
      __syncthreads();
    }
    if (unit < end_unit && member == 0) {
      for (int other = warp + 1; other < warp + team; ++other) sum.merge(team_sums[other][lane]);
      store_unit<T>(p, decode::query_vector(a, share.request, row / a.rows, row % a.rows), column,
                    sum);
    }
    if (team > 1) __syncthreads();
  }
}

}  // namespace flashmla::combine
