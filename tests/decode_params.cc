// Prints the offset of each member of DecodeParams that benchmarks/replays.py spells, and its size.
#include <cstddef>
#include <cstdio>

#include "../cuda/params.h"

using flashmla::DecodeParams;

#define PRINT_OFFSET(member) std::printf(#member " %zu\n", offsetof(DecodeParams, member))

int main() {
  PRINT_OFFSET(element_type);
  PRINT_OFFSET(q_latent);
  PRINT_OFFSET(q_rope);
  PRINT_OFFSET(kv_cache);
  PRINT_OFFSET(block_table);
  PRINT_OFFSET(cache_seqlens);
  PRINT_OFFSET(tile_scheduler_metadata);
  PRINT_OFFSET(num_splits);
  PRINT_OFFSET(out);
  PRINT_OFFSET(lse);
  PRINT_OFFSET(partial_out);
  PRINT_OFFSET(partial_rows);
  PRINT_OFFSET(q_latent_stride);
  PRINT_OFFSET(q_rope_stride);
  PRINT_OFFSET(batch);
  PRINT_OFFSET(s_q);
  PRINT_OFFSET(h_q);
  PRINT_OFFSET(h_kv);
  PRINT_OFFSET(num_pages);
  PRINT_OFFSET(max_pages_per_seq);
  PRINT_OFFSET(num_sm_parts);
  PRINT_OFFSET(softmax_scale);
  PRINT_OFFSET(causal);
  PRINT_OFFSET(early_start);
  PRINT_OFFSET(serial);
  PRINT_OFFSET(delay_seed);
  std::printf("size %zu\n", sizeof(DecodeParams));
}
