// The moves of the page pool. Each function returns nullptr when it
// succeeded, else the reason it did not; launches are the same for the same shapes: graph-safe.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::cache {

// Load the kernels on the current device, outside graph capture.
const char* prepare_append();
const char* prepare_gather();

const char* launch_append(const AppendParams& params, cudaStream_t stream);
const char* launch_gather(const GatherParams& params, cudaStream_t stream);

}  // namespace flashmla::cache
