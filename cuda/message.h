// A CUDA error as the launch API tells it: nullptr for success, else the reason.
#pragma once

#include <cuda_runtime_api.h>

namespace flashmla {

inline const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flashmla
