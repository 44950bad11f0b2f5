// Lets the arithmetic that host tests check compile with and without a CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define FLASHMLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASHMLA_HOST_DEVICE inline
#endif
