// The absorbed query projection. Each function returns nullptr when it succeeded, else the reason
// it did not; launches are the same for the same shapes: graph-safe.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::queries {

// Loads the kernels on the current device, outside graph capture.
const char* prepare_queries();

const char* launch_queries(const QueriesParams& params, cudaStream_t stream);

}  // namespace flashmla::queries
