// The kernels as a shared library of C functions.
#include "library.h"

namespace flashmla {
extern "C" {

const char* flashmla_prepare() { return prepare_device(); }

const char* flashmla_schedule(const ScheduleParams& params, cudaStream_t stream) {
  return launch_schedule(params, stream);
}

const char* flashmla_decode(const DecodeParams& params, cudaStream_t stream) {
  return launch_decode(params, stream);
}

int flashmla_decode_params_bytes() { return sizeof(DecodeParams); }

runner::Replay* flashmla_capture(const DecodeParams* calls, int count) {
  return new runner::Replay([=](cudaStream_t stream) {
    const char* error = nullptr;
    for (int call = 0; call < count && error == nullptr; ++call) {
      error = launch_decode(calls[call], stream);
    }
    return error;
  });
}

void flashmla_start(runner::Replay* replay) { replay->start(); }

const char* flashmla_wait(runner::Replay* replay) {
  replay->wait();
  return replay->error();
}

}  // extern "C"
}  // namespace flashmla
