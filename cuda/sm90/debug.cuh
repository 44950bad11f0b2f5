// Checked builds. FLASHMLA_DELAYS: shared memory starts as NaN and roles can be delayed at random,
// the code otherwise being the released one. FLASHMLA_DEBUG: that, and waits are bounded and name
// what is stuck (their printf makes ptxas serialise WGMMA).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace flashmla::sm90 {

#ifdef FLASHMLA_DEBUG
inline constexpr bool kDebug = true;
#else
inline constexpr bool kDebug = false;
#endif
#ifdef FLASHMLA_DELAYS
inline constexpr bool kDelays = true;
#else
inline constexpr bool kDelays = kDebug;
#endif

inline constexpr long long kDebugWaitClocks = 2'000'000'000;  // about a second

// The barrier is named by its shared-memory address: the kernel's storage.h gives their order.
__device__ __noinline__ inline void report_stuck_barrier(uint32_t address, uint32_t parity) {
  printf(
      "stuck: block %d, warp %d (cuda/README.md has the roles), lane %d, barrier at %u, parity "
      "%u\n",
      static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x / 32),
      static_cast<int>(threadIdx.x % 32), address, parity);
  asm volatile("trap;");
}

// Checked builds: wait up to 4096 clocks, differently for each seed, block, warp and moment.
__device__ __forceinline__ void random_delay(uint32_t seed) {
  if constexpr (kDelays) {
    if (seed == 0) return;
    uint32_t hash = (seed * 2654435761u) ^ (blockIdx.x * 40503u) ^ ((threadIdx.x / 32) * 97u) ^
                    static_cast<uint32_t>(clock64());
    hash ^= hash >> 15;
    hash *= 0x85EBCA6Bu;
    hash ^= hash >> 13;
    const long long until = clock64() + (__shfl_sync(~0u, hash, 0) & 4095);
    while (clock64() < until) {
    }
  }
}

// Checked builds: odd seeds make a guess wrong.
__device__ __forceinline__ int spoil_guess(int guess, uint32_t seed) {
  if constexpr (kDelays) return guess + static_cast<int>(seed % 2);
  return guess;
}

// Checked builds: shared memory starts as NaN, so that nothing can rely on its content.
__device__ __forceinline__ void fill_with_nan(void* memory, size_t bytes) {
  if constexpr (kDelays) {
    uint32_t* const words = static_cast<uint32_t*>(memory);
    for (size_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = 0xFFFFFFFFu;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }
}

}  // namespace flashmla::sm90
