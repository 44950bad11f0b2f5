// Fixed sizes of the decode kernel for few query rows: tiles, roles, rings. README.md explains the
// choice.
#pragma once

#include <cstdint>

#include "../decode/config.h"

namespace flashmla::decode_few {

using decode::kQkTiles;
using decode::kWarpgroup;
using decode::kWarpsPerWarpgroup;

inline constexpr int kMostRows = 32;  // more are faster as M of a WGMMA than as N
inline constexpr int kRowStep = 8;    // N of a WGMMA comes in eights

// Warps: four for the scores, four for each half of the values, and these.
inline constexpr int kValueWarps = 2 * kWarpsPerWarpgroup;
inline constexpr int kProducerWarp = kWarpsPerWarpgroup + kValueWarps;
inline constexpr int kQueryLoaderWarp = kProducerWarp + 1;
inline constexpr int kThreads = (kQueryLoaderWarp + 1) * 32;

// A page of keys is nine tiles of 64 tokens x 64 columns; it arrives, and is freed, in three parts.
inline constexpr int kPageParts = 3;
inline constexpr int kPartTiles = kQkTiles / kPageParts;
inline constexpr int kHalfTiles = kHeadDimV / 64 / 2;  // of V: what a warpgroup of the values has
inline constexpr uint32_t kPartBytes = kPartTiles * sm90::kTileBytes;
static_assert(kPartTiles * kPageParts == kQkTiles);

// Rows of a query or P tile: R rounded up.
FLASHMLA_HOST_DEVICE constexpr int padded_rows(int rows) {
  return (rows + kRowStep - 1) / kRowStep * kRowStep;
}

}  // namespace flashmla::decode_few
