// The launch API: everything above (XLA handlers, the standalone runner) calls only this.
// Each function returns nullptr when it succeeded, else the reason it did not.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla {

// Once per device, outside graph capture: loads the kernels, raises their shared-memory limits,
// looks up the tensor-map encoder. Idempotent; works on the current device.
const char* prepare_device();

// tile_scheduler_metadata and num_splits from cache_seqlens.
const char* launch_schedule(const ScheduleParams& params, cudaStream_t stream);

// out and lse. Always the same launches for the same shapes, whatever the data: graph-safe.
const char* launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace flashmla
