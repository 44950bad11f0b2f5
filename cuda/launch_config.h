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
  // `cluster`: so many neighbours of a grid whose width allows it run at once, two of them on the
  // two SMs of a TPC. Clusters fill one GPC after the other, single blocks all GPCs alike
  // (README.md).
  LaunchConfig(dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, bool early,
               int cluster) {
    config_.gridDim = blocks;
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (early) {
      add(cudaLaunchAttributeProgrammaticStreamSerialization)
          .programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1 && blocks.x % cluster == 0) {
      auto& size = add(cudaLaunchAttributeClusterDimension).clusterDim;
      size.x = static_cast<unsigned>(cluster);
      size.y = size.z = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  // nullptr, or what went wrong.
  template <class Kernel, class... Arguments>
  const char* launch(Kernel* kernel, const Arguments&... arguments) const {
    return message(cudaLaunchKernelEx(&config_, kernel, arguments...));
  }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attributes_[2] = {};
};

}  // namespace flashmla
