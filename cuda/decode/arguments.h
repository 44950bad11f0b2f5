// The kernel's one parameter, and where a block stands in the grid.
#pragma once

#include <cuda.h>

#include "../params.h"
#include "config.h"
#include "work.h"

namespace flashmla::decode {

struct Arguments {
  // The pool as {64 columns, 64 tokens, 9 * h_kv tiles, pages}; box: kBoxTiles tiles, or one.
  CUtensorMap latent_map;
  CUtensorMap rope_map;
  // Where a request's packed rows follow one another (one KV head): {64 columns, R rows, tiles,
  // batch}; box: the query tile's latent or rotary columns, rows from R on as zeros.
  CUtensorMap q_latent_map;
  CUtensorMap q_rope_map;
  DecodeParams params;
  int rows;                           // R: packed query rows per request and KV head
  int heads_per_kv;                   // h_q / h_kv; packed row r is query r / heads_per_kv
  int row_tiles;                      // ceil(rows / 64)
  int max_length;                     // keys that a block_table row can hold
  float scale_log2;                   // softmax_scale * log2(e)
  schedule::Divider by_rows;          // divides by rows,
  schedule::Divider by_heads_per_kv;  // and by heads_per_kv
  bool few;  // rows are decode_few's; its splits have their columns in order, those
             // of tiles as fragments have them (epilogue.cuh)
};

inline void set_rows(Arguments& a, int rows, int heads_per_kv) {
  a.rows = rows;
  a.heads_per_kv = heads_per_kv;
  a.by_rows = schedule::make_divider(rows);
  a.by_heads_per_kv = schedule::make_divider(heads_per_kv);
}

// Neighbouring blocks read the same pages at the same time: row tiles run fastest.
struct BlockPlace {
  int part;
  int kv_head;
  int first_row;
};

__device__ __forceinline__ BlockPlace block_place(const Arguments& a) {
  const int tiles = a.row_tiles * a.params.h_kv;
  const int block = static_cast<int>(blockIdx.x);
  const int tile = block % tiles;
  return {block / tiles, tile / a.row_tiles, tile % a.row_tiles * kRowTile};
}

// Index of a packed row among the [batch, s_q, h_q] query vectors.
__device__ __forceinline__ long long query_vector(const Arguments& a, int request, int kv_head,
                                                  int row) {
  const int query = a.by_heads_per_kv.quotient(row);
  const int head = kv_head * a.heads_per_kv + row - query * a.heads_per_kv;
  return (static_cast<long long>(request) * a.params.s_q + query) * a.params.h_q + head;
}

__device__ __forceinline__ PartRange read_part(const Arguments& a, int part) {
  return read_part(
      a.params.tile_scheduler_metadata + static_cast<long long>(part) * kScheduleColumns,
      a.params.batch);
}

__device__ __forceinline__ WorkItem read_item(const Arguments& a, const PartRange& part,
                                              int request) {
  return make_item(part, request, a.params.cache_seqlens[request], a.max_length);
}

__device__ __forceinline__ int find_destination(const Arguments& a, const PartRange& part,
                                                int request) {
  const int before = a.params.num_splits[request];
  const int splits = a.params.num_splits[request + 1] - before;
  if (splits <= 1) return kWhole;
  const int split = request == part.begin_request ? part.begin_split : 0;
  const int slot = schedule::split_slot(before, request, split);
  return slot >= 0 && slot < 2 * a.params.num_sm_parts ? slot : kNowhere;
}

}  // namespace flashmla::decode
