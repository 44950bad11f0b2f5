// How the rows of split requests are shared out among combine's blocks.
#pragma once

#include "../decode/config.h"

namespace flashmla::combine {

inline constexpr int kGroupLanes = 8;
inline constexpr int kWarpGroups = 32 / kGroupLanes;
inline constexpr int kFewRowsPerBlock = 16;  // what a block has of a part with few rows

// For row tiles of 64, or for few rows: of one or two blocks' worth.
template <int kMostRows>
struct Blocks {
  static constexpr bool kFew = kMostRows < decode::kRowTile;
  static constexpr int kWarps = kFew ? 4 : 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kGroups = kWarps * kWarpGroups;
  // Of a part, for each row tile of a KV head. For few rows no more than there is work for: the
  // blocks of all parts then start on the SMs that the decode kernel leaves first, and none behind
  // its last.
  static constexpr int kPerTile = kFew ? kMostRows / kFewRowsPerBlock : 3;
  // Those of all parts are one wave.
  static constexpr int kPerSm = kFew ? 5 : kPerTile;
  // Percent of an SM's memory that is to be shared memory while they run. Less than the decode
  // kernels take is faster where the next one begins early (H200: 16 heads, 1 x 4096 8.2 -> 6.8 us,
  // 64 heads 10.5 against 11.1 with all of it), probably because no block of one kernel then begins
  // on an SM that still has one of the other. 0 is best for 16 rows, 3% slower for 32 at 128 x
  // 1024.
  static constexpr int kSharedPercent = kMostRows == kFewRowsPerBlock ? 0 : kFew ? 14 : 50;
};

}  // namespace flashmla::combine
