// Shared memory of one block, and its barriers (table with arrivals and meaning: README.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../decode/storage.h"
#include "../decode/work.h"
#include "config.h"

namespace flashmla::decode_few {

// Pages whose weights may wait for their values.
inline constexpr int kWeightSlots = 4;

template <int kSlots>
struct Barriers {
  uint64_t part_full[kSlots];            // producer's TMA -> scores
  uint64_t part_empty[kSlots];           // values -> producer
  uint64_t query_full[2];                // query loader and its TMA -> math, by item parity
  uint64_t query_empty[2];               // scores and values -> query loader
  uint64_t sums_ready[2];                // scores -> values, by item parity
  uint64_t weights_ready[kWeightSlots];  // scores -> values
  uint64_t first_known;                  // producer -> math, once
};

// Arrivals that complete one phase of each barrier.
inline constexpr int kPartFullArrivals = 1;  // plus the TMA bytes
inline constexpr int kPartEmptyArrivals = kValueWarps;
inline constexpr int kQueryFullArrivals = 2;  // query and assignment; plus the TMA bytes
inline constexpr int kQueryEmptyArrivals = kWarpsPerWarpgroup + kValueWarps;
inline constexpr int kSumsReadyArrivals = kWarpsPerWarpgroup * 4;  // a lane per pair of rows
inline constexpr int kWeightsReadyArrivals = kSumsReadyArrivals;
inline constexpr int kFirstKnownArrivals = 1;

// Of the barrier with this index in Barriers<kSlots>.
template <int kSlots>
FLASHMLA_HOST_DEVICE constexpr int arrivals(int index) {
  if (index < kSlots) return kPartFullArrivals;
  if (index < 2 * kSlots) return kPartEmptyArrivals;
  if (index < 2 * kSlots + 2) return kQueryFullArrivals;
  if (index < 2 * kSlots + 4) return kQueryEmptyArrivals;
  return index < 2 * kSlots + 6 + kWeightSlots ? kSumsReadyArrivals : kFirstKnownArrivals;
}

// Named barriers; 0 is __syncthreads.
enum NamedBarrier : uint32_t {
  kScoresMeet = 1,  // the warps of the scores, when all have theirs
  kValuesMeet = 2,  // the warps of the values, before and after they stage output
};

// What a block keeps beside page parts and query tiles.
template <int kRows, int kSlots>
struct SmallStorage {
  float page_max[2][kWarpsPerWarpgroup][kRows];  // by page parity: maxima of 16 tokens each
  float factors[kWeightSlots][kRows];            // what the values so far are multiplied by
  float row_sum[2][kWarpsPerWarpgroup][kRows];   // by item parity: sums of weights at its end
  float magnitudes[kValueWarps][kRows];          // of a split's output, by warp: its columns
  Barriers<kSlots> barriers;
  decode::Assignment assignments[2];  // by item parity: the query loader's word to math
  uint32_t first_slot;                // of the first page's first part: the producer's word to math
};

template <int kRows>
struct Storage {
  static constexpr uint32_t kQueryTileBytes = kRows * sm90::kTileRowBytes;

  // As many page parts as fit.
  static constexpr int count_slots() {
    const size_t taken = 2 * kQkTiles * kQueryTileBytes + sizeof(SmallStorage<kRows, 16>);
    return static_cast<int>((decode::kSharedLimit - taken) / kPartBytes);
  }
  static constexpr int kSlots = count_slots();
  static_assert(kSlots >= 2 * kPageParts && kSlots <= 16);
  // Scores of a page need all its parts, and values free a page before the one after next is
  // complete: scores are at most so many pages ahead of the values.
  static_assert((kSlots + kPageParts - 1) / kPageParts < kWeightSlots);

  alignas(1024) uint8_t parts[kSlots][kPartTiles][sm90::kTileBytes];  // [slots][3][64 tokens][64]
  // The weights P of a page, [rows][64 tokens], replace its rotary tile once its scores are known;
  // an item's output replaces its last page, part by part.
  alignas(1024) uint8_t query[2][kQkTiles][kQueryTileBytes];  // by item parity: [9][rows][64]
  SmallStorage<kRows, kSlots> small;
};

}  // namespace flashmla::decode_few
