// The decode kernel for at most kMostRows packed query rows, as decode/launch.cu calls it.
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace flashmla::decode_few {

// Raises the kernels' shared-memory limits on the current device. nullptr, or what went wrong.
const char* prepare();

// The decode kernel alone, without the combine.
const char* launch(const decode::Arguments& a, cudaStream_t stream);

}  // namespace flashmla::decode_few
