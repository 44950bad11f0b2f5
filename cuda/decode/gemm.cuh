// The two products of attention as runs of WGMMA: scores S = Q Kᵀ and output O += P V.
//
// In the serial variant (kSerial, a test target) each instruction is waited for; otherwise a run is
// one commit group that the caller waits for.
#pragma once

#include "../sm90/wgmma.cuh"
#include "softmax.cuh"
#include "storage.h"

namespace flashmla::decode {

template <bool kSerial, int kCount>
__device__ __forceinline__ void after_wgmma(float (&accumulators)[kCount]) {
  if constexpr (kSerial) {
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::pin_registers(accumulators);
    sm90::wgmma_fence();
  }
}

// scores (+)= the part of Q Kᵀ that runs over these tiles of the columns.
template <class T, bool kSerial>
__device__ __forceinline__ void add_scores(float (&scores)[32], uint64_t query, uint64_t page,
                                           TileRange tiles) {
#pragma unroll
  for (int tile = tiles.begin; tile < tiles.begin + tiles.count; ++tile) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t offset = tile * sm90::kStepTile + step * sm90::kStepAlongRow;
      sm90::wgmma_scores<T>(scores, query + offset, page + offset, tile != 0 || step != 0);
      after_wgmma<kSerial>(scores);
    }
  }
}

// out += P V with P in registers (the half that computed it).
template <class T, bool kSerial>
__device__ __forceinline__ void add_values(float (&out)[128], const Weights& weights,
                                           uint64_t values) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    sm90::wgmma_values<T>(out, weights[step], values + step * sm90::kStepDownRows);
    after_wgmma<kSerial>(out);
  }
}

// out += P V with P in shared memory (the other half).
template <class T, bool kSerial>
__device__ __forceinline__ void add_values(float (&out)[128], uint64_t weights, uint64_t values) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    sm90::wgmma_values<T>(out, weights + step * sm90::kStepAlongRow,
                          values + step * sm90::kStepDownRows);
    after_wgmma<kSerial>(out);
  }
}

// Multiplies a half of O by each row's factor.
__device__ __forceinline__ void rescale(float (&out)[128], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) out[i] *= factor[i / 2 % 2];
}

}  // namespace flashmla::decode
