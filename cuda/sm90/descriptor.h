// Shared-memory operand tiles: their swizzle and the WGMMA descriptors that name them.
//
// A tile is 64 rows of 128 bytes (64 elements of 16 bits), 128-byte swizzled: within each group of
// 8 rows the 16-byte chunk c of row r lies at chunk position c ^ (r % 8). TMA writes tiles this way
// and WGMMA reads them this way. PTX ISA, "Asynchronous warpgroup level matrix shared memory
// layout".
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace flashmla::sm90 {

inline constexpr uint32_t kTileRows = 64;
inline constexpr uint32_t kTileRowBytes = 128;
inline constexpr uint32_t kTileBytes = kTileRows * kTileRowBytes;
inline constexpr uint32_t kSwizzleGroupBytes = 8 * kTileRowBytes;
inline constexpr uint32_t kChunkBytes = 16;

// Byte offset in a tile of a row's 16-byte chunk.
FLASHMLA_HOST_DEVICE constexpr uint32_t swizzled_chunk(uint32_t row, uint32_t chunk) {
  return row * kTileRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Descriptor fields count in 16-byte units: address bits 0-13, leading offset 16-29,
// stride offset 32-45, swizzle mode 62-63 (1: 128 bytes).
FLASHMLA_HOST_DEVICE constexpr uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes,
                                                        uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// What to add to a descriptor to move it by so many bytes.
FLASHMLA_HOST_DEVICE constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// Operand whose reduction dimension runs along a tile's rows of 128 bytes (Q, K, P).
FLASHMLA_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t address) {
  return make_descriptor(address, kChunkBytes, kSwizzleGroupBytes);  // leading offset: unused
}

// Operand without a swizzle, of 8 x 8 matrices whose rows of 16 bytes follow each other: matrices
// lie `along_bytes` apart along the reduction dimension, `across_bytes` apart across it.
FLASHMLA_HOST_DEVICE constexpr uint64_t plain_descriptor(uint32_t address, uint32_t along_bytes,
                                                         uint32_t across_bytes) {
  return make_descriptor(address, along_bytes, across_bytes) & ~(uint64_t{3} << 62);
}

// Operand whose reduction dimension runs down the rows (V = the transposed view of K's columns);
// further columns follow a tile later.
FLASHMLA_HOST_DEVICE constexpr uint64_t mn_major_descriptor(uint32_t address) {
  return make_descriptor(address, kTileBytes, kSwizzleGroupBytes);
}

// One WGMMA reduces over 16 elements: 32 bytes along a row, or 16 rows down a tile.
inline constexpr uint64_t kStepAlongRow = descriptor_step(32);
inline constexpr uint64_t kStepDownRows = descriptor_step(16 * kTileRowBytes);
inline constexpr uint64_t kStepTile = descriptor_step(kTileBytes);

}  // namespace flashmla::sm90
