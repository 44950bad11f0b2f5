// Warpgroup matrix multiply-accumulate: the three shapes of the decode kernel, for bf16 and fp16.
//
// Everything else in the project calls the functions at the end.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "wgmma_operands.h"

namespace flashmla::sm90 {

// Orders register accesses before the next WGMMA. Also wanted after a barrier wait between two
// batches, else ptxas serialises them (C7519).
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that the accumulators change here: without it ptxas moves accesses across the
// wait and then serialises (C7514).
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for values that a load brings: nothing made of them is computed before this.
template <class... Integers>
__device__ __forceinline__ void pin_integers(Integers&... values) {
  (..., [&] { asm volatile("" : "+r"(values)::"memory"); }());
}

// Keeps derived descriptors from being precomputed into (spilling) registers.
__device__ __forceinline__ void hide_descriptor(uint64_t& descriptor) {
  asm volatile("" : "+l"(descriptor));
}

// clang-format off
#define FLASHMLA_SCORES(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
    " {" FLASHMLA_REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n" \
    : FLASHMLA_ACCUMULATORS_32 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define FLASHMLA_VALUES_SHARED(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type \
    " {" FLASHMLA_REGISTERS_128 "}, %128, %129, p, 1, 1, 0, 1;\n}\n" \
    : FLASHMLA_ACCUMULATORS_128 : "l"(a), "l"(b))
#define FLASHMLA_VALUES_REGISTERS(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type \
    " {" FLASHMLA_REGISTERS_128 "}, {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}\n" \
    : FLASHMLA_ACCUMULATORS_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// clang-format on

template <class T>
inline constexpr bool kIsBfloat16 = std::is_same_v<T, __nv_bfloat16>;

// d [64, 64] = a [64, 16] · b [64, 16]ᵀ (+ d): both operands K-major in shared memory.
template <class T>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b,
                                             bool accumulate) {
  if constexpr (kIsBfloat16<T>) {
    FLASHMLA_SCORES("bf16");
  } else {
    FLASHMLA_SCORES("f16");
  }
}

// d [64, 256] += a [64, 16] · b [16, 256]: a K-major, b MN-major, both in shared memory.
template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (kIsBfloat16<T>) {
    FLASHMLA_VALUES_SHARED("bf16");
  } else {
    FLASHMLA_VALUES_SHARED("f16");
  }
}

// The same with a in registers: its fragment is the accumulator fragment of two 8-column blocks.
template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kIsBfloat16<T>) {
    FLASHMLA_VALUES_REGISTERS("bf16");
  } else {
    FLASHMLA_VALUES_REGISTERS("f16");
  }
}

#undef FLASHMLA_SCORES
#undef FLASHMLA_VALUES_SHARED
#undef FLASHMLA_VALUES_REGISTERS

}  // namespace flashmla::sm90
