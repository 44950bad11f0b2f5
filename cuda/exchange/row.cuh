// A row as it travels: chunks of 16 bytes, each three words of the row and the number of the
// exchange.
//
// Whoever sees the number in a chunk has its words too, because 16 bytes are written and read as
// one. So nothing has to be awaited between a row and a signal that it has come, at the price of a
// third more bytes; the idea is NCCL's protocol LL, with chunks of 16 bytes instead of 8.
#pragma once

#include <cstdint>

#include "../pair.cuh"
#include "mailbox.h"

namespace flashmla::exchange {

inline constexpr int kLaneChunks = (kRowChunks + 31) / 32;  // lane l has l, l + 32, l + 64
inline constexpr int kLaneColumns = kLaneChunks * kChunkWords * 2;
inline constexpr int kLseChunk = kRowWords / kChunkWords;  // the word behind the columns: word 256
inline constexpr int kLseWord = kRowWords % kChunkWords;

// A lane's share of a row.
struct RowShare {
  uint32_t words[kLaneChunks][kChunkWords];

  static __device__ __forceinline__ int chunk(int lane, int i) { return lane + 32 * i; }

  // Of a row in ordinary memory.
  __device__ __forceinline__ void load(const uint32_t* row, const float* lse, int lane) {
#pragma unroll
    for (int i = 0; i < kLaneChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kChunkWords; ++j) {
        const int word = chunk(lane, i) * kChunkWords + j;
        words[i][j] = word < kRowWords ? row[word] : word == kRowWords ? __float_as_uint(*lse) : 0;
      }
    }
  }

  // To another device.
  __device__ __forceinline__ void write(uint4* slot, uint32_t number, int lane) const {
#pragma unroll
    for (int i = 0; i < kLaneChunks; ++i) {
      if (chunk(lane, i) >= kRowChunks) continue;
      asm volatile(
          "{\n\t.reg .b64 low, high;\n\t.reg .b128 chunk;\n\t"
          "mov.b64 low, {%1, %2};\n\tmov.b64 high, {%3, %4};\n\t"
          "mov.b128 chunk, {low, high};\n\t"
          "st.relaxed.sys.global.b128 [%0], chunk;\n\t}" ::"l"(slot + chunk(lane, i)),
          "r"(words[i][0]), "r"(words[i][1]), "r"(words[i][2]), "r"(number)
          : "memory");
    }
  }

  // What has come of it so far. Returns whether that is all of this lane's share.
  __device__ __forceinline__ bool read(const uint4* slot, uint32_t number, int lane) {
    bool come = true;
#pragma unroll
    for (int i = 0; i < kLaneChunks; ++i) {
      if (chunk(lane, i) >= kRowChunks) continue;
      uint32_t written;
      asm volatile(
          "{\n\t.reg .b64 low, high;\n\t.reg .b128 chunk;\n\t"
          "ld.relaxed.sys.global.b128 chunk, [%4];\n\t"
          "mov.b128 {low, high}, chunk;\n\t"
          "mov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
          : "=r"(words[i][0]), "=r"(words[i][1]), "=r"(words[i][2]), "=r"(written)
          : "l"(slot + chunk(lane, i))
          : "memory");
      come &= written == number;
    }
    return come;
  }

  // The lse, which one lane holds; all lanes of the warp call this.
  __device__ __forceinline__ float lse() const {
    return __uint_as_float(__shfl_sync(~0u, words[kLseChunk / 32][kLseWord], kLseChunk % 32));
  }

  template <class T>
  __device__ __forceinline__ void unpack(float (&values)[kLaneColumns]) const {
#pragma unroll
    for (int i = 0; i < kLaneColumns / 2; ++i) {
      const float2 pair = unpack_pair<T>(words[i / kChunkWords][i % kChunkWords]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }

  // The opposite of unpack(), rounded, and of lse().
  template <class T>
  __device__ __forceinline__ void pack(const float (&values)[kLaneColumns], float lse, int lane) {
#pragma unroll
    for (int i = 0; i < kLaneColumns / 2; ++i) {
      words[i / kChunkWords][i % kChunkWords] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    }
    if (lane == kLseChunk % 32) words[kLseChunk / 32][kLseWord] = __float_as_uint(lse);
  }

  // Into ordinary memory.
  __device__ __forceinline__ void store(uint32_t* row, float* lse, int lane) const {
#pragma unroll
    for (int i = 0; i < kLaneChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kChunkWords; ++j) {
        const int word = chunk(lane, i) * kChunkWords + j;
        if (word < kRowWords) row[word] = words[i][j];
        if (word == kRowWords) *lse = __uint_as_float(words[i][j]);
      }
    }
  }
};

}  // namespace flashmla::exchange
