// Fixed sizes of the decode kernel: tiles, roles, registers. README.md explains the choice.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../sm90/descriptor.h"

namespace flashmla::decode {

inline constexpr int kRowTile = 64;  // query rows per block: M of one WGMMA
inline constexpr int kWarpgroup = 128;
inline constexpr int kThreads = 3 * kWarpgroup;  // producer, left half, right half
inline constexpr int kWarpsPerWarpgroup = 4;
inline constexpr int kQueryLoaderWarps = 3;  // the producer warpgroup's warps 1-3

// setmaxnreg budgets: 40 + 2 * 232 registers for each of 128 lanes are what the launch got.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kMathRegisters = 232;
static_assert(kProducerRegisters + 2 * kMathRegisters <= 65536 / kThreads / 8 * 8 * 3);

// A page of keys lies in shared memory as nine tiles of 64 tokens x 64 columns; it arrives, and is
// freed, in three parts.
inline constexpr int kQkTiles = kHeadDimQk / 64;
inline constexpr int kHalfTiles = kHeadDimV / 2 / 64;  // tiles of half of V
enum PagePart : int { kLeft, kRight, kRope, kPageParts };
inline constexpr int kPageSlots = 2;

struct TileRange {
  int begin;
  int count;
};
FLASHMLA_HOST_DEVICE constexpr TileRange part_tiles(int part) {
  return {part * kHalfTiles, part == kRope ? 1 : kHalfTiles};
}
inline constexpr uint32_t kPageBytes = kQkTiles * sm90::kTileBytes;

FLASHMLA_HOST_DEVICE constexpr uint32_t part_bytes(int part) {
  return static_cast<uint32_t>(part_tiles(part).count) * sm90::kTileBytes;
}
static_assert(part_bytes(kLeft) + part_bytes(kRight) + part_bytes(kRope) == kPageBytes);
static_assert(kPageBytes == kPageSize * kHeadDimQk * 2);

// The two math roles: each owns half of V's columns, and the scores of every other page.
enum Half : int { kLeftHalf, kRightHalf };

}  // namespace flashmla::decode
