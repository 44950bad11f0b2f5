// The merge of partial results. Each function returns nullptr when it
// succeeded, else the reason it did not; launches are the same for the same shapes: graph-safe.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::merge {

// Loads the kernels on the current device, outside graph capture.
const char* prepare_merge();

const char* launch_merge(const MergeParams& params, cudaStream_t stream);

}  // namespace flashmla::merge
