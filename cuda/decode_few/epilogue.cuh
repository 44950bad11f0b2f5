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
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  for (int i = thread; i < target.rows() * kChunks; i += kWarpgroup) {
    const int row = i / kChunks;
    reinterpret_cast<uint4*>(target.values(row))[i % kChunks] = make_uint4(0, 0, 0, 0);
    if (i % kChunks < 2 && !target.whole()) target.partial(row).scale[i % kChunks] = 1.f;
  }
}

template <int kRows>
using Output = float[kValueTiles][kRows / 2];

// An item's output as T, the output type or float32, in the parts of its last page: each holds its
// own columns, in rows of 16-byte chunks. The chunks of a row change places so that the lanes that
// stage fragments use all banks: eight rows side by side want eight places; as float32 four rows
// share two chunks each.
template <class T>
struct Stage {
  static constexpr int kRowBytes = kPartTiles * 64 * 4;
  static constexpr int kPerChunk = sm90::kChunkBytes / sizeof(T);
  static constexpr int kMixedBits = sizeof(T) == 4 ? 6 : 7;
  uint32_t parts[kPageParts];

  __device__ __forceinline__ static uint32_t chunk_offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row & kMixedBits)) * sm90::kChunkBytes;
  }
  __device__ __forceinline__ uint32_t element(int part, int row, int column) const {
    return parts[part] + chunk_offset(row, column / kPerChunk) + column % kPerChunk * sizeof(T);
  }
};
static_assert(kMostRows * Stage<float>::kRowBytes <= kPartBytes);

// A part's columns of the output, times each row's factor.
template <int kPart, int kRows, class T>
__device__ __forceinline__ void stage_part(const Stage<T>& stage, const Output<kRows>& out,
                                           const RowValues<kRows>& factor) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int column = fragment_line(0) - lane / 4 + lane / 8 % 2 * 8;
#pragma unroll
  for (int tile = 0; tile < part_value_tiles(kPart); ++tile) {
#pragma unroll
    for (int block = 0; block < kRows / 8; ++block) {
      const float* const values = out[kPart * kPartTiles + tile] + block * 4;
      sm90::store_transposed_x2(
          stage.element(kPart, block * 8 + lane % 8, tile * 64 + column),
          {decode::pack_pair<T>(values[0] * factor[block][0], values[1] * factor[block][1]),
           decode::pack_pair<T>(values[2] * factor[block][0], values[3] * factor[block][1])});
    }
  }
}

template <int kPart, int kRows>
__device__ __forceinline__ void stage_part(const Stage<float>& stage, const Output<kRows>& out,
                                           const RowValues<kRows>& factor) {
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int row = fragment_query_row(i / 4) + i % 2;
#pragma unroll
    for (int tile = 0; tile < part_value_tiles(kPart); ++tile) {
      sm90::store_shared(stage.element(kPart, row, tile * 64 + fragment_line(i / 2 % 2)),
                         out[kPart * kPartTiles + tile][i] * factor[i / 4][i % 2]);
    }
  }
}

// Staged rows to global memory: a warp has a row's chunks i * 32 + lane.
template <class T>
class StagedRows {
 public:
  __device__ StagedRows(const Stage<T>& stage, const Target& target)
      : stage_(stage), target_(target) {}

  __device__ __forceinline__ void store() const {
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / 32 % kWarpsPerWarpgroup; row < target_.rows();
         row += kWarpsPerWarpgroup) {
      uint4 data[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) data[i] = load(row, i * 32 + lane());
      if constexpr (sizeof(T) == 4) {
        store_scaled(row, data);
      } else {
        uint4* const chunks = reinterpret_cast<uint4*>(target_.values(row)) + lane();
#pragma unroll
        for (int i = 0; i < kChunks; ++i) chunks[i * 32] = data[i];
      }
    }
  }

 private:
  static constexpr int kChunks = kHeadDimV / Stage<T>::kPerChunk / 32;

  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    constexpr int kPerPart = kPartTiles * 64 / Stage<T>::kPerChunk;
    const int part = chunk / kPerPart;
    const uint32_t base = part == 0   ? stage_.parts[0]
                          : part == 1 ? stage_.parts[1]
                                      : stage_.parts[2];
    return sm90::load_shared(base + Stage<T>::chunk_offset(row, chunk % kPerPart));
  }

  // float32 to float16, scaled by halves of the row.
  __device__ __forceinline__ void store_scaled(int row, const uint4 (&data)[kChunks]) const {
    uint2* const chunks = reinterpret_cast<uint2*>(target_.values(row)) + lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4* const mine = data + half * (kChunks / 2);
      // Magnitudes are ordered as their bits are; NaN comes last.
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kChunks / 2; ++i) {
        for (const uint32_t bits : {mine[i].x, mine[i].y, mine[i].z, mine[i].w}) {
          most = max(most, bits & 0x7FFFFFFF);
        }
      }
      const float scale = decode::partial_scale(__uint_as_float(__reduce_max_sync(~0u, most)));
#pragma unroll
      for (int i = 0; i < kChunks / 2; ++i) {
        const auto scaled = [&](uint32_t bits) { return __uint_as_float(bits) * scale; };
        chunks[(half * (kChunks / 2) + i) * 32] =
            make_uint2(decode::pack_pair<__half>(scaled(mine[i].x), scaled(mine[i].y)),
                       decode::pack_pair<__half>(scaled(mine[i].z), scaled(mine[i].w)));
      }
      if (lane() == 0) target_.partial(row).scale[half] = 1.f / scale;
    }
  }

  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  const Stage<T>& stage_;
  const Target& target_;
};

}  // namespace flashmla::decode_few
