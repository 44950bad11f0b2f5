// Warpgroup matrix multiply-accumulate of few columns and of any number that the projections have:
// 64 x N x 16, N = 8, 16, 24, 32, 64 or 128, both operands in shared memory, for bf16 and fp16. N
// is taken from the accumulators: N / 2 of them.
#pragma once

#include "wgmma.cuh"

namespace flashmla::sm90 {

// clang-format off
// The operands behind `count` accumulators: a, b, accumulate, a's order.
#define FLASHMLA_NARROW(count, n, a_operand, b_operand, flag_operand, order_operand, type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" flag_operand ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" \
    FLASHMLA_REGISTERS_##count "}, %" a_operand ", %" b_operand ", p, 1, 1, %" order_operand \
    ", 0;\n}\n" \
    : FLASHMLA_ACCUMULATORS_##count \
    : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposed)))
#define FLASHMLA_NARROW_OF_TYPE(type) \
  if constexpr (kCount == 4) FLASHMLA_NARROW(4, "8", "4", "5", "6", "7", type); \
  if constexpr (kCount == 8) FLASHMLA_NARROW(8, "16", "8", "9", "10", "11", type); \
  if constexpr (kCount == 12) FLASHMLA_NARROW(12, "24", "12", "13", "14", "15", type); \
  if constexpr (kCount == 16) FLASHMLA_NARROW(16, "32", "16", "17", "18", "19", type); \
  if constexpr (kCount == 32) FLASHMLA_NARROW(32, "64", "32", "33", "34", "35", type); \
  if constexpr (kCount == 64) FLASHMLA_NARROW(64, "128", "64", "65", "66", "67", type)
// clang-format on

// d [64, N] = a · b [N, 16]ᵀ (+ d), b K-major. a is [64, 16] and K-major or, if kTransposed,
// [16, 64] and read down the rows.
template <class T, bool kTransposed, int kCount>
__device__ __forceinline__ void wgmma_narrow(float (&d)[kCount], uint64_t a, uint64_t b,
                                             bool accumulate) {
  static_assert((kCount % 4 == 0 && kCount <= 16) || kCount == 32 || kCount == 64);
  if constexpr (kIsBfloat16<T>) {
    FLASHMLA_NARROW_OF_TYPE("bf16");
  } else {
    FLASHMLA_NARROW_OF_TYPE("f16");
  }
}

#undef FLASHMLA_NARROW
#undef FLASHMLA_NARROW_OF_TYPE

}  // namespace flashmla::sm90
