// Blocks of a cluster: each other's shared memory and barriers.
#pragma once

#include "barrier.cuh"

namespace flashmla::sm90 {

// All threads of all blocks arrive, and wait before they first reach into another block.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Copies to where the block of a rank has what this block has at `target`; there `barrier` counts
// the bytes. One thread; the source must not change before they have been counted.
__device__ __forceinline__ void copy_to_block(const void* target, const void* source,
                                              uint32_t bytes, const Barrier& barrier, int rank) {
  uint32_t there;
  uint32_t barrier_there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(target)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(barrier_there)
               : "r"(shared_address(&barrier)), "r"(rank));
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(there),
      "r"(shared_address(source)), "r"(bytes), "r"(barrier_there)
      : "memory");
}

}  // namespace flashmla::sm90
