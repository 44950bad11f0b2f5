// The kernel's one parameter.
#pragma once

#include "../decode/arguments.h"
#include "config.h"

namespace flashmla::decode_few {

struct Arguments : decode::Arguments {
  CUtensorMap page_map;  // the pool; box: a part of a page
  CUtensorMap
      query_latent_map;        // {64 columns, h_q, batch * s_q, 8 tiles}; box: see query_box_tiles
  CUtensorMap query_rope_map;  // the same with 1 tile
};

// A box of queries is all rows of a request and KV head, of so many tiles: of all if such tiles are
// as long as those in shared memory.
FLASHMLA_HOST_DEVICE constexpr int query_box_tiles(int rows) {
  return rows % kRowStep == 0 ? kQkTiles - 1 : 1;
}

using decode::PartRange;
using decode::WorkItem;

}  // namespace flashmla::decode_few
