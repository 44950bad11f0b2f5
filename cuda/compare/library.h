// What flashmla_compare and benchmarks/replays.py ask of a build of the kernels: launch.h, and CUDA
// graphs of calls, by names that they can look up.
#pragma once

#include "../launch.h"
#include "../runner/replay.h"

#define FLASHMLA_EXPORTED __attribute__((visibility("default")))

namespace flashmla {
extern "C" {

FLASHMLA_EXPORTED const char* flashmla_prepare();
FLASHMLA_EXPORTED const char* flashmla_schedule(const ScheduleParams& params, cudaStream_t stream);
FLASHMLA_EXPORTED const char* flashmla_decode(const DecodeParams& params, cudaStream_t stream);

// sizeof(DecodeParams), for callers that spell it in another language.
FLASHMLA_EXPORTED int flashmla_decode_params_bytes();

// A graph of `count` decode steps back to back, on a stream of its own; kept until the process
// ends.
FLASHMLA_EXPORTED runner::Replay* flashmla_capture(const DecodeParams* calls, int count);
FLASHMLA_EXPORTED void flashmla_start(runner::Replay* replay);
// Waits for all that was started. nullptr, or what went wrong since the capture.
FLASHMLA_EXPORTED const char* flashmla_wait(runner::Replay* replay);

}  // extern "C"
}  // namespace flashmla
