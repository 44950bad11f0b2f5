// A kernel launch that may begin while the kernel before it on the stream is at its end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "message.h"

namespace flashmla {

class LaunchConfig {
 public:
  // `early`: programmatic dependent launch. The kernel must call wait_for_previous_kernel before
  // it relies on what it reads from global memory, or writes any.
  LaunchConfig(dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, bool early) {
    config_.gridDim = blocks;
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    early_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early_.val.programmaticStreamSerializationAllowed = 1;
    config_.attrs = &early_;
    config_.numAttrs = early ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  // nullptr, or what went wrong.
  template <class Kernel, class... Arguments>
  const char* launch(Kernel* kernel, const Arguments&... arguments) const {
    return message(cudaLaunchKernelEx(&config_, kernel, arguments...));
  }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute early_ = {};
};

}  // namespace flashmla
