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

// A page of keys lies in shared memory as nine tiles of 64 tokens x 64 columns. It is freed in
// three parts, and arrives in boxes of one TMA request each: two of a half of V, one of the rope.
inline constexpr int kQkTiles = kHeadDimQk / 64;
inline constexpr int kHalfTiles = kHeadDimV / 2 / 64;  // tiles of half of V
inline constexpr int kBoxTiles = 2;
inline constexpr int kBoxesPerHalf = kHalfTiles / kBoxTiles;
inline constexpr int kPageBoxes = 2 * kBoxesPerHalf + 1;
enum PagePart : int { kLeft, kRight, kRope, kPageParts };
inline constexpr int kPageSlots = 2;

struct TileRange {
  int begin;
  int count;
};
FLASHMLA_HOST_DEVICE constexpr TileRange part_tiles(int part) {
  return {part * kHalfTiles, part == kRope ? 1 : kHalfTiles};
}
FLASHMLA_HOST_DEVICE constexpr TileRange box_tiles(int box) {
  return {box * kBoxTiles, box == kPageBoxes - 1 ? 1 : kBoxTiles};
}
// The part that a box belongs to, and whether it is the part's last.
FLASHMLA_HOST_DEVICE constexpr int part_of(int box) { return box / kBoxesPerHalf; }
FLASHMLA_HOST_DEVICE constexpr bool ends_part(int box) {
  return box == kPageBoxes - 1 || part_of(box) != part_of(box + 1);
}
FLASHMLA_HOST_DEVICE constexpr uint32_t bytes_of(TileRange tiles) {
  return static_cast<uint32_t>(tiles.count) * sm90::kTileBytes;
}
inline constexpr int kRopeTile = part_tiles(kRope).begin;
inline constexpr uint32_t kPageBytes = kQkTiles * sm90::kTileBytes;
static_assert(kPageBytes == kPageSize * kHeadDimQk * 2);

// The two math roles: each owns half of V's columns, and the scores of every other page.
enum Half : int { kLeftHalf, kRightHalf };

}  // namespace flashmla::decode
