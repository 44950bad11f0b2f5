#pragma once

#include "options.h"

namespace flashmla::runner {

// Microseconds per call from a CUDA graph of back-to-back calls over rotating KV sets (cold L2).
bool time_calls(const Options& options);

}  // namespace flashmla::runner
