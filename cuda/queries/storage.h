// Sizes, roles and shared memory of a block (schedule and barriers: README.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../sm90/descriptor.h"
#include "params.h"

namespace flashmla::queries {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWarpsPerGroup = kWarpgroup / 32;
inline constexpr int kMostSplits = 8;  // blocks that share a head: what a cluster can be anywhere
inline constexpr int kLatentTiles = kKvLoraRank / kTile;
inline constexpr int kMostStages = 6;
inline constexpr int kSharedLimit = 227 * 1024;

// Each math warpgroup has 64 columns of a head; the last one has the rotary ones.
template <int kNopeTiles>
inline constexpr int kMathGroups = kNopeTiles + 1;
// And a warp that loads.
template <int kNopeTiles>
inline constexpr int kThreads = kMathGroups<kNopeTiles> * kWarpgroup + 32;

// Of more tokens there is no room for the columns of a cluster.
FLASHMLA_HOST_DEVICE constexpr int most_split_tokens(int nope_tiles) {
  return nope_tiles == 2 ? 64 : 32;
}

enum NamedBarrier : uint32_t {
  kBegun = 1,          // all threads: barriers are initialised
  kMathMeet = 2,       // all math warpgroups
  kWarpgroupMeet = 3,  // + warpgroup: the threads of one
};

// `kSplits`: blocks of a cluster may share a head.
template <int kNopeTiles, int kTokens, bool kSplits>
struct Storage {
  static constexpr int kGroups = kMathGroups<kNopeTiles>;
  static constexpr int kColumns = kGroups * kTile;
  static constexpr int kVectors = kColumns / 8;                     // of a head's columns
  static constexpr int kTokenTile = kTokens * sm90::kTileRowBytes;  // [tokens][64], swizzled
  static constexpr int kVectorBytes = kTokens * sm90::kChunkBytes;
  // Neighbouring columns start in other banks.
  static constexpr int kColumnBytes = (kTokens + (kTokens == 8 ? 0 : 4)) * 4;

  static constexpr int kWeightBytes = kGroups * sm90::kTileBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenTile;
  // As many stages as fit beside so many bytes.
  static constexpr int count_stages(int taken) {
    const int fit = (kSharedLimit - kVectors * kVectorBytes - taken - 1024) / kStageBytes;
    return fit < kMostStages ? fit : kMostStages;
  }
  // On its way out q_latent takes the place of x, where that has one for each warpgroup.
  static constexpr bool kOutOverX = !kSplits && count_stages(0) >= kGroups;
  static constexpr int kOutBytes = kGroups * kTokenTile;
  static constexpr int kScratchBytes = kSplits     ? 2 * kColumns * kColumnBytes
                                       : kOutOverX ? 16
                                                   : kOutBytes;
  static constexpr int kStages = count_stages(kScratchBytes);
  static_assert(kStages >= 2 && (!kSplits || kOutBytes <= kScratchBytes));

  // [stages]: query_up [groups][64 of width][64 columns]; then key_up [nope][64 columns]
  alignas(1024) uint8_t weights[kStages][kWeightBytes];
  alignas(1024) uint8_t x[kStages][kTokenTile];
  // A head's queries, eight columns at a time: [vectors][tokens][8].
  alignas(128) uint8_t queries[kVectors][kVectorBytes];
  // float32 [columns][tokens]: what the block has, and what it gets of the columns that it adds up;
  // then, or without, each warpgroup's tile of q_latent on its way out.
  alignas(1024) uint8_t scratch[kScratchBytes];
  struct {
    uint64_t full[kStages];   // TMA -> math
    uint64_t empty[kStages];  // math -> producer
    uint64_t columns_ready;   // the other blocks of a cluster -> math
    uint64_t queries_ready;   // the same
    uint64_t may_leave;       // the same: nobody copies from here any more
  } barriers;

  __device__ __forceinline__ uint8_t* out(int group) {
    return kOutOverX ? x[group] : scratch + group * kTokenTile;
  }
  __device__ __forceinline__ uint8_t* own_columns(int column) {
    return scratch + column * kColumnBytes;
  }
  __device__ __forceinline__ uint8_t* others_columns(int column) {
    return scratch + (kColumns + column) * kColumnBytes;
  }
};
static_assert(sizeof(Storage<2, 64, true>) <= kSharedLimit);
static_assert(sizeof(Storage<2, 64, false>) <= kSharedLimit);
static_assert(sizeof(Storage<2, 128, false>) <= kSharedLimit);
static_assert(sizeof(Storage<3, 32, true>) <= kSharedLimit);
static_assert(sizeof(Storage<3, 64, false>) <= kSharedLimit);
static_assert(sizeof(Storage<3, 128, false>) <= kSharedLimit);

}  // namespace flashmla::queries
