// What a launch needs: plain pointers and sizes, no XLA type.
#pragma once

#include <cstdint>

namespace flashmla {

inline constexpr int kPageSize = 64;     // tokens per page
inline constexpr int kKvLoraRank = 512;  // latent columns of a query or key; also head_dim_v
inline constexpr int kRopeDim = 64;      // rotary columns
inline constexpr int kHeadDimQk = kKvLoraRank + kRopeDim;
inline constexpr int kHeadDimV = kKvLoraRank;
inline constexpr int kScheduleColumns = 8;  // TileSchedulerMetaDataSize

enum class ElementType { kBfloat16, kFloat16, kFloat32 };  // float32: the merge alone

struct ScheduleParams {
  const int* cache_seqlens;      // [batch]
  int* tile_scheduler_metadata;  // [num_sm_parts, kScheduleColumns]
  int* num_splits;               // [batch + 1]
  int batch;
  int num_sm_parts;
};

// What one split made of one packed row. Its values lie in `partial_out` as float16, multiplied by
// a power of two, one for each half of the columns, that brings the largest near the top of
// float16's range: relative to it they keep 11 bits, and small ones lose none until 2^-29 of it.
struct alignas(16) PartialRow {
  float lse;       // natural logarithm; -inf: the split holds no key that the row sees
  float scale[2];  // value = float16 * scale[column / 256]
  float unused;
};
inline constexpr int kPartialRowFloats = sizeof(PartialRow) / sizeof(float);

struct DecodeParams {
  ElementType element_type;
  const void* q_latent;      // [batch, s_q, h_q, 512], rows q_latent_stride elements apart
  const void* q_rope;        // [batch, s_q, h_q, 64], rows q_rope_stride elements apart
  const void* kv_cache;      // [num_pages, 64, h_kv, 576]
  const int* block_table;    // [batch, max_pages_per_seq]
  const int* cache_seqlens;  // [batch]
  const int* tile_scheduler_metadata;  // [num_sm_parts, kScheduleColumns]
  const int* num_splits;               // [batch + 1]
  void* out;                           // [batch, s_q, h_q, 512]
  float* lse;                          // [batch, s_q, h_q]
  uint16_t* partial_out;               // [2 * num_sm_parts, h_kv, rows, 512], scaled float16
  PartialRow* partial_rows;            // [2 * num_sm_parts, h_kv, rows]
  int q_latent_stride;
  int q_rope_stride;
  int batch;
  int s_q;
  int h_q;
  int h_kv;
  int num_pages;
  int max_pages_per_seq;
  int num_sm_parts;
  float softmax_scale;
  bool causal;
  bool early_start = false;  // may begin before the kernel ahead on the stream has ended
  bool serial = false;       // wait after every WGMMA: the golden kernel of the tests
  unsigned delay_seed = 0;   // debug builds: random delays in every role
};

}  // namespace flashmla
