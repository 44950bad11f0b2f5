// What an item leaves behind: the finished rows of a whole request, or the partial result of a
// split. A thread holds Oᵀ fragments, columns of V down and query rows across. They go to global
// memory by way of the page part whose values they are: there a row is together again.
#pragma once

#include "../decode/epilogue.cuh"
#include "../sm90/copy.cuh"
#include "arguments.h"
#include "softmax.cuh"

namespace flashmla::decode_few {

// An item's rows in the output or the workspace.
class Target {
 public:
  __device__ __forceinline__ Target(const Arguments& a, int kv_head, int request, int destination)
      : a_(a), kv_head_(kv_head), request_(request), destination_(destination) {}

  __device__ __forceinline__ bool exists() const { return destination_ != decode::kNowhere; }
  __device__ __forceinline__ bool whole() const { return destination_ == decode::kWhole; }
  __device__ __forceinline__ int rows() const { return a_.rows; }

  __device__ __forceinline__ float& lse(int row) const {
    return whole() ? a_.params.lse[vector(row)] : partial(row).lse;
  }
  __device__ __forceinline__ PartialRow& partial(int row) const {
    return a_.params.partial_rows[vector(row)];
  }
  // A row's 512 values of 16 bits.
  __device__ __forceinline__ uint16_t* values(int row) const {
    void* const array = whole() ? a_.params.out : a_.params.partial_out;
    return static_cast<uint16_t*>(array) + vector(row) * kHeadDimV;
  }

 private:
  // Index of a row among the vectors of `out` or of the workspace. One KV head's are neighbours.
  __device__ __forceinline__ long long vector(int row) const {
    const int heads = a_.params.h_kv;
    if (!whole()) return (static_cast<long long>(destination_) * heads + kv_head_) * a_.rows + row;
    if (heads == 1) return static_cast<long long>(request_) * a_.rows + row;
    return decode::query_vector(a_, request_, kv_head_, row);
  }

  const Arguments& a_;
  int kv_head_;
  int request_;
  int destination_;
};

// An item without pages: zeros.
__device__ __forceinline__ void store_zeros(const Target& target) {
  constexpr int kChunks = kHeadDimV * 2 / sm90::kChunkBytes;
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
  for (int i = thread; i < target.rows() * kChunks; i += kValueWarps * 32) {
    const int row = i / kChunks;
    reinterpret_cast<uint4*>(target.values(row))[i % kChunks] = make_uint4(0, 0, 0, 0);
    if (i % kChunks < 2 && !target.whole()) target.partial(row).scale[i % kChunks] = 1.f;
  }
}

template <int kRows>
using Output = float[kHalfTiles][kRows / 2];

// An item's output in 16 bits, in the parts of its last page: each holds its own columns, in rows
// of 16-byte chunks. The chunks of a row change places so that the lanes that stage fragments use
// all banks: eight rows side by side want eight places.
struct Stage {
  static constexpr int kRowBytes = kPartTiles * 64 * 2;
  static constexpr int kPerChunk = sm90::kChunkBytes / 2;
  uint32_t parts[kPageParts];

  // An index known at run time would put the array into local memory.
  __device__ __forceinline__ uint32_t part(int index) const {
    return index == 0 ? parts[0] : index == 1 ? parts[1] : parts[2];
  }
  __device__ __forceinline__ static uint32_t chunk_offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row % 8) * sm90::kChunkBytes;
  }
};
static_assert(kMostRows * Stage::kRowBytes <= kPartBytes);

// Eight rows of two tiles of the output as T, times each row's factor. `first`: of the two, in V.
template <class T, int kRows>
__device__ __forceinline__ void stage_rows(const Stage& stage, const Output<kRows>& out, int tile,
                                           int first, int block, const float (&factor)[2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int mine = first + lane / 16;  // the tile that this lane gives addresses for
  const int column = fragment_line(0) - lane / 4 + lane / 8 % 2 * 8;
  const int chunk = (mine % kPartTiles * 64 + column) / Stage::kPerChunk;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const values = out[tile + i / 2] + block * 4 + i % 2 * 2;
    pairs[i] = pack_pair<T>(values[0] * factor[0], values[1] * factor[1]);
  }
  sm90::store_transposed_x4(
      stage.part(mine / kPartTiles) + Stage::chunk_offset(block * 8 + lane % 8, chunk), pairs);
}

// A staged row to global memory, by a warp.
__device__ __forceinline__ void store_row_staged(const Stage& stage, const Target& target,
                                                 int row) {
  constexpr int kChunks = kHeadDimV / Stage::kPerChunk / 32;
  constexpr int kPerPart = kPartTiles * 64 / Stage::kPerChunk;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint4* const chunks = reinterpret_cast<uint4*>(target.values(row));
  uint4 data[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = i * 32 + lane;
    data[i] = sm90::load_shared(stage.part(chunk / kPerPart) +
                                Stage::chunk_offset(row, chunk % kPerPart));
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunks[i * 32 + lane] = data[i];
}

// The largest magnitudes of a thread's rows among a warp's columns.
template <int kRows>
__device__ __forceinline__ void warp_magnitudes(const Output<kRows>& out, RowValues<kRows>& most) {
#pragma unroll
  for (int block = 0; block < kRows / 8; ++block) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float value = 0.f;
#pragma unroll
      for (int tile = 0; tile < kHalfTiles; ++tile) {
        const float* const values = out[tile] + block * 4 + which;
        value = fmaxf(value, fmaxf(fabsf(values[0]), fabsf(values[2])));
      }
      most[block][which] = max_of_row(value);
    }
  }
}

}  // namespace flashmla::decode_few
