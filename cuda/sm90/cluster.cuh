// Blocks of a cluster: each other's shared memory and barriers.
#pragma once

#include "barrier.cuh"

namespace flashmla::sm90 {

// All threads of all blocks arrive, then wait before the first of them reaches into another block.
// Of what was written before, others see only barriers, set up behind `barrier_init_fence`: a
// release would wait for stores. compute-sanitizer waits for every thread of a cluster to get here:
// let none of them first wait for what another one does later.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
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

// Arrives at `barrier` where the block of a rank has it. It says nothing of this thread's stores.
__device__ __forceinline__ void arrive_at_block(const Barrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace flashmla::sm90
