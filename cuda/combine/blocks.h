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
  // Of a part, for each row tile of a KV head: no more than there is work for, so that the blocks
  // of all parts start on the SMs that the decode kernel leaves first, and none behind its last.
  // Parts with many tiles have three for each: 256 rows, 1 x 4096, 15.2 -> 14.0 us, while 64 and
  // 128 rows have two, 10.3 -> 9.9, 11.1 -> 10.5, 16 x 4096 27.3 -> 26.7, 35.1 -> 34.2 (H200).
  static constexpr int kMostPerTile = kFew ? kMostRows / kFewRowsPerBlock : 3;
  static constexpr int per_tile(int part_tiles) {
    return !kFew && part_tiles <= 2 ? 2 : kMostPerTile;
  }
  // Those of all parts are one wave.
  static constexpr int kPerSm = kFew ? 5 : 3;
  // Percent of an SM's memory that is to be shared memory while they run. Less than the decode
  // kernels take is faster where the next one begins early (H200: 16 heads, 1 x 4096 8.2 -> 6.8 us,
  // 64 heads 9.95 against 10.3 with all of it), probably because no block of one kernel then begins
  // on an SM that still has one of the other. 0 is best for 16 rows, 3% slower for 32 at 128 x
  // 1024 and for 64 at 1 x 4096.
  static constexpr int kSharedPercent = kMostRows == kFewRowsPerBlock ? 0 : 14;
};

}  // namespace flashmla::combine
