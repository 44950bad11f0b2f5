// What the merge of partial results gets. No CUDA header, no XLA type.
#pragma once

#include "../params.h"

namespace flashmla::merge {

struct MergeParams {
  ElementType partial_type;
  ElementType out_type;
  const void* outs;   // [partials, rows, head_dim]
  const float* lses;  // [partials, rows], -inf: empty, its out is never used
  void* out;          // [rows, head_dim]
  float* lse;         // [rows]
  int partials;
  int rows;
  int head_dim;  // a multiple of 8
};

}  // namespace flashmla::merge
