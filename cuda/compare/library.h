// What flashmla_compare asks of a build of the kernels: launch.h, by names that it can look up.
#pragma once

#include "../launch.h"

#define FLASHMLA_EXPORTED __attribute__((visibility("default")))

namespace flashmla {
extern "C" {

FLASHMLA_EXPORTED const char* flashmla_prepare();
FLASHMLA_EXPORTED const char* flashmla_schedule(const ScheduleParams& params, cudaStream_t stream);
FLASHMLA_EXPORTED const char* flashmla_decode(const DecodeParams& params, cudaStream_t stream);

}  // extern "C"
}  // namespace flashmla
