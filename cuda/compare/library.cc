// The kernels as a shared library of C functions, for flashmla_compare.
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

}  // extern "C"
}  // namespace flashmla
