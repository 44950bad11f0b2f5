// Shared memory of one block, and its barriers (table with arrivals and meaning: README.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "config.h"
#include "work.h"

namespace flashmla::decode {

struct Barriers {
  uint64_t page_full[kPageSlots][kPageBoxes];   // producer's TMA -> the page's owner
  uint64_t page_empty[kPageSlots][kPageParts];  // last reader of the part -> producer
  uint64_t query_full;                          // query loaders -> both halves
  uint64_t query_empty;                         // both halves -> query loaders
  uint64_t weights_ready[2];                    // owner of an even / odd page -> the other half
  uint64_t odd_scored;                          // right half's warps -> one another
  uint64_t sums_ready;                          // both halves -> both halves, once per item
};

// Arrivals that complete one phase of each barrier.
inline constexpr int kPageFullArrivals = 1;  // plus the TMA bytes
inline constexpr int kPageEmptyArrivals = kWarpsPerWarpgroup;
inline constexpr int kQueryFullArrivals = kQueryLoaderWarps;
inline constexpr int kQueryEmptyArrivals = 2 * kWarpsPerWarpgroup;
inline constexpr int kWeightsReadyArrivals = kWarpsPerWarpgroup * 8;  // a lane per pair of rows
inline constexpr int kOddScoredArrivals = kWarpsPerWarpgroup;
inline constexpr int kSumsReadyArrivals = 2 * kWeightsReadyArrivals;

// Named barriers between math warps; 0 is __syncthreads.
enum NamedBarrier : uint32_t {
  kOwnWarps = 1,  // + Half: a half's four warps, to zero rows behind the last key
};

struct Storage {
  alignas(1024) uint8_t query[kQkTiles][sm90::kTileBytes];              // [9][64 rows][64 columns]
  alignas(1024) uint8_t pages[kPageSlots][kQkTiles][sm90::kTileBytes];  // [2][9][64 tokens][64]
  alignas(1024) uint8_t even_weights[sm90::kTileBytes];                 // P of an even page
  // P of an odd page replaces that page's rope tile.
  float reference[2][kRowTile];   // of the softmax after the last even / odd page that moved it
  float row_sum[2][2][kRowTile];  // by item parity, then half: sums of weights at an item's end
  int reference_moved[2][kWarpsPerWarpgroup];  // by the last even / odd page, for a warp's rows
  Barriers barriers;
  PartRange part;             // what the block does, for every role
  Assignment assignments[2];  // by item parity: the query loaders' word to both halves
};

inline constexpr size_t kSharedLimit = 232448;
static_assert(sizeof(Storage) <= kSharedLimit);
static_assert(offsetof(Storage, query) % 1024 == 0 && offsetof(Storage, pages) % 1024 == 0);

}  // namespace flashmla::decode
