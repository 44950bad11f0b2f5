// What XLA hands to the handlers of the cache operations and of the merge, checked before a launch
// sees it. No CUDA in here.
#pragma once

#include "../cache/params.h"
#include "../merge/params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla {

namespace ffi = ::xla::ffi;

struct AppendBuffers {
  ffi::AnyBuffer cache;          // [num_pages, 64, 1, 576]
  ffi::AnyBuffer latent;         // [n, 512]
  ffi::AnyBuffer rope;           // [n, 64]
  ffi::AnyBuffer slots;          // [n]
  ffi::RemainingArgs rotation;   // nothing, or cos and sin, [n, 32] each
  ffi::AnyBuffer written_cache;  // the first operand's memory
};

struct AppendProjectedBuffers {
  ffi::AnyBuffer cache;          // [num_pages, 64, 1, 576]
  ffi::AnyBuffer projected;      // [n, w]: its last 576 columns are latent and rotary key
  ffi::AnyBuffer slots;          // [n]
  ffi::AnyBuffer latent_norm;    // [512]
  ffi::AnyBuffer cos;            // [n, 32]
  ffi::AnyBuffer sin;            // [n, 32]
  ffi::AnyBuffer written_cache;  // the first operand's memory
};

struct GatherBuffers {
  ffi::AnyBuffer cache;          // [num_pages, 64, h_kv, 576]
  ffi::AnyBuffer block_table;    // [b, max_pages_per_seq]
  ffi::AnyBuffer cache_seqlens;  // [b]
  ffi::AnyBuffer tokens;         // [b, max_pages_per_seq * 64, h_kv, 576]
};

struct MergeBuffers {
  ffi::AnyBuffer outs;  // [n, rows, d]
  ffi::AnyBuffer lses;  // [n, rows]
  ffi::AnyBuffer out;   // [rows, d]
  ffi::AnyBuffer lse;   // [rows]
};

// The launch parameters that the buffers spell, or an error naming the argument, what was got and
// what was expected.
ffi::ErrorOr<cache::AppendParams> append_params(const AppendBuffers& buffers, bool interleave);
ffi::ErrorOr<cache::AppendParams> append_projected_params(const AppendProjectedBuffers& buffers,
                                                          bool interleave, float norm_eps);
ffi::ErrorOr<cache::GatherParams> gather_params(const GatherBuffers& buffers);
ffi::ErrorOr<merge::MergeParams> merge_params(const MergeBuffers& buffers);

}  // namespace flashmla
