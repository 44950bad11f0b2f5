// mbarriers (with a phase and, for TMA, a byte count), named barriers and proxy fences.
#pragma once

#include <cstdint>
#include <cstdio>

#include "debug.cuh"

namespace flashmla::sm90 {

using Barrier = uint64_t;  // 8 bytes of shared memory

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the async proxy.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Bytes that the current phase waits for, without arriving.
__device__ __forceinline__ void barrier_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(Barrier& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Returns once the phase of this parity has completed. A fresh barrier counts its (imaginary)
// phase of parity 1 as complete.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, uint32_t parity) {
  if constexpr (kDebug) {
    const long long start = clock64();
    while (!barrier_try_wait(barrier, parity)) {
      if (clock64() - start > kDebugWaitClocks)
        report_stuck_barrier(shared_address(&barrier), parity);
    }
  } else {
    while (!barrier_try_wait(barrier, parity)) {
    }
  }
}

// All `threads` threads that name barrier `id` meet here.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Does not wait for the others.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Programmatic dependent launch: lets the next kernel's blocks start as this grid's make room; it
// must call wait_for_previous_kernel before it touches global memory.
__device__ __forceinline__ void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before later TMA or WGMMA accesses by
// whoever synchronises with it.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flashmla::sm90
