// What append and gather get. No CUDA header, no XLA type.
#pragma once

#include "../params.h"

namespace flashmla::cache {

inline constexpr int kMostRank = 4096;

// How the rotary key is stored.
enum class Rotation {
  kNone,         // as it is
  kHalfSplit,    // columns (i, i + 32) rotated by angle i
  kInterleaved,  // columns (2i, 2i + 1) rotated by angle i, and moved to (i, i + 32)
};

struct AppendParams {
  ElementType element_type;
  Rotation rotation;
  void* cache;         // [num_pages, 64, 1, 576]
  const void* latent;  // [rows, 512]
  const void* rope;    // [rows, 64]
  int latent_stride;   // elements from a row to the next
  int rope_stride;     // the same
  const void* norm;    // [512], or nullptr: no norm; the latent is divided by its root mean
  float norm_eps;      // square, to which this is added, and multiplied by that
  const int* slots;    // [rows]: page * 64 + offset; anything outside the pool writes nothing
  const float* cos;    // [rows, 32], with a rotation
  const float* sin;    // [rows, 32], with a rotation
  int rows;
  int num_pages;
  const void* query_norm;  // [rank], with a norm of the latent; or nullptr: queries are not normed
  const void* low_rank;    // [rows, rank], latent_stride elements from a row to the next, are
  void* normed;            // [rows, rank]
  int rank;                // a multiple of 8, at most kMostRank
  bool early_start;        // may begin before the kernel ahead on the stream has ended
};

struct GatherParams {
  const void* cache;         // [num_pages, 64, h_kv, 576], elements of 16 bits
  const int* block_table;    // [batch, max_pages_per_seq]
  const int* cache_seqlens;  // [batch]
  void* tokens;              // [batch, max_pages_per_seq * 64, h_kv, 576]
  int batch;
  int h_kv;
  int num_pages;
  int max_pages_per_seq;
};

}  // namespace flashmla::cache
