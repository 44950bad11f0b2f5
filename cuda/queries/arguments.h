// What the kernel is launched with.
#pragma once

#include <cuda.h>

#include "params.h"

namespace flashmla::queries {

struct Arguments {
  QueriesParams params;
  CUtensorMap x_map;         // {64 columns, tokens, width / 64}, a box: [kTokens][64]
  CUtensorMap query_up_map;  // {64 columns, width, tiles of a head, h_q}, a box: a head's 64 rows
  CUtensorMap key_up_map;    // {64 columns, nope, 8, h_q}, a box: [nope][64]
  CUtensorMap down_map;      // {64 columns, width, 9}, a box: as many columns as a head's
  int splits;                // blocks that share a head: a cluster
};

}  // namespace flashmla::queries
