// What XLA hands over for the absorbed query projection, checked before a launch sees it. No CUDA
// in here.
#pragma once

#include "../queries/params.h"
#include "expectation.h"

namespace flashmla {

struct QueriesBuffers {
  ffi::AnyBuffer x;         // [batch, s_q, width]
  ffi::AnyBuffer query_up;  // [width, h_q, nope + 64]
  ffi::AnyBuffer key_up;    // [h_q, nope, 512]
  ffi::AnyBuffer cos;       // [batch, s_q, 32]
  ffi::AnyBuffer sin;       // [batch, s_q, 32]
  ffi::AnyBuffer q_latent;  // [batch, s_q, h_q, 512]
  ffi::AnyBuffer q_rope;    // [batch, s_q, h_q, 64]
};

// The launch parameters that the buffers spell, or an error naming the argument, what was got and
// what was expected.
ffi::ErrorOr<queries::QueriesParams> queries_params(const QueriesBuffers& buffers, bool interleave);

// Adds the projection x `down`: [width, 576] to [batch, s_q, 576].
ffi::Error add_down(const ffi::AnyBuffer& down, const ffi::AnyBuffer& projected,
                    queries::QueriesParams& params);

}  // namespace flashmla
