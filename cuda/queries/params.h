// What the absorbed query projection gets. No CUDA header, no XLA type.
#pragma once

#include "../params.h"

namespace flashmla::queries {

inline constexpr int kTile = 64;         // rows or columns of an operand tile
inline constexpr int kMostTokens = 128;  // of a block

struct QueriesParams {
  ElementType element_type;
  const void* x;         // [tokens, width]
  const void* query_up;  // [width, h_q, nope + 64]
  const void* key_up;    // [h_q, nope, 512]
  const void* down;      // [width, 576], or nullptr: nothing else is projected
  const float* cos;      // [tokens, 32]
  const float* sin;      // [tokens, 32]
  void* q_latent;        // [tokens, h_q, 512]
  void* q_rope;          // [tokens, h_q, 64]
  void* projected;       // [tokens, 576], x times `down`
  int tokens;
  int width;  // a multiple of 64
  int h_q;
  int nope;                  // 128 or 192
  bool interleave;           // the rotary columns hold pairs (2i, 2i + 1), not (i, i + 32)
  bool early_start = false;  // may begin before the kernel ahead on the stream has ended
};

}  // namespace flashmla::queries
