// What XLA hands to a handler, checked before a launch sees it. The Python side checks the same
// when it traces; this catches programs that reach the handler another way. No CUDA in here.
#pragma once

#include "../params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

struct ScheduleBuffers {
  ffi::AnyBuffer cache_seqlens;            // [batch]
  ffi::AnyBuffer tile_scheduler_metadata;  // [num_sm_parts, 8]
  ffi::AnyBuffer num_splits;               // [batch + 1]
};

struct DecodeBuffers {
  ffi::AnyBuffer q_latent;                 // [batch, s_q, h_q, 512]; joined: [..., 576]
  ffi::AnyBuffer q_rope;                   // [batch, s_q, h_q, 64]; joined: the same [..., 576]
  ffi::AnyBuffer kv_cache;                 // [num_pages, 64, h_kv, 576]
  ffi::AnyBuffer block_table;              // [batch, max_pages_per_seq]
  ffi::AnyBuffer cache_seqlens;            // [batch]
  ffi::AnyBuffer tile_scheduler_metadata;  // [num_sm_parts, 8]
  ffi::AnyBuffer num_splits;               // [batch + 1]
  ffi::AnyBuffer out;                      // [batch, s_q, h_q, 512]
  ffi::AnyBuffer lse;                      // [batch, s_q, h_q]
  ffi::AnyBuffer partial_out;              // [2 * num_sm_parts, h_kv, rows, 512]
  ffi::AnyBuffer partial_rows;             // [2 * num_sm_parts, h_kv, rows, 4]
};

// The launch parameters that the buffers spell, or an error naming the argument, what was got and
// what was expected.
ffi::ErrorOr<ScheduleParams> schedule_params(const ScheduleBuffers& buffers);
ffi::ErrorOr<DecodeParams> decode_params(const DecodeBuffers& buffers, float softmax_scale,
                                         bool causal);

}  // namespace flashmla
