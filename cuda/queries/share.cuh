// A block's share of the work.
#pragma once

#include "../sm90/cluster.cuh"
#include "arguments.h"
#include "storage.h"

namespace flashmla::queries {

// `splits` blocks, a cluster, share a head: each has some of the width, then some of q_latent. What
// is projected down counts as further heads, without an absorption.
struct Share {
  int head;
  int first_token;
  int splits;
  int rank;
  int begin_step;  // of the width, 64 at a time
  int end_step;
  int begin_tile;  // of q_latent, 64 columns each
  int end_tile;
  bool is_down;

  __device__ Share(const Arguments& a, int tokens) {
    splits = a.splits;
    rank = static_cast<int>(blockIdx.x) % splits;
    head = static_cast<int>(blockIdx.x) / splits;
    first_token = static_cast<int>(blockIdx.y) * tokens;
    const int steps = a.params.width / kTile;
    begin_step = rank * steps / splits;
    end_step = (rank + 1) * steps / splits;
    begin_tile = rank * kLatentTiles / splits;
    end_tile = (rank + 1) * kLatentTiles / splits;
    is_down = head >= a.params.h_q;
    if (is_down) {
      head -= a.params.h_q;
      end_tile = begin_tile;
    }
  }
};

}  // namespace flashmla::queries
