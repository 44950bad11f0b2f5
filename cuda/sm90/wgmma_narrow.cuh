// Warpgroup matrix multiply-accumulate with few columns: 64 x N x 16, N = 8, 16, 24 or 32, both
// operands in shared memory, for bf16 and fp16. N is taken from the accumulators: N / 2 of them.
#pragma once

#include "wgmma.cuh"

namespace flashmla::sm90 {

// clang-format off
#define FLASHMLA_REGISTERS_4 "%0, %1, %2, %3"
#define FLASHMLA_REGISTERS_8 FLASHMLA_REGISTERS_4 ", %4, %5, %6, %7"
#define FLASHMLA_REGISTERS_12 FLASHMLA_REGISTERS_8 ", %8, %9, %10, %11"
#define FLASHMLA_REGISTERS_16 FLASHMLA_REGISTERS_12 ", %12, %13, %14, %15"
#define FLASHMLA_ACCUMULATORS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FLASHMLA_ACCUMULATORS_8 \
  FLASHMLA_ACCUMULATORS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FLASHMLA_ACCUMULATORS_12 \
  FLASHMLA_ACCUMULATORS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FLASHMLA_ACCUMULATORS_16 \
  FLASHMLA_ACCUMULATORS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])

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
  if constexpr (kCount == 16) FLASHMLA_NARROW(16, "32", "16", "17", "18", "19", type)
// clang-format on

// d [64, N] = a · b [N, 16]ᵀ (+ d), b K-major. a is [64, 16] and K-major or, if kTransposed,
// [16, 64] and read down the rows.
template <class T, bool kTransposed, int kCount>
__device__ __forceinline__ void wgmma_narrow(float (&d)[kCount], uint64_t a, uint64_t b,
                                             bool accumulate) {
  static_assert(kCount % 4 == 0 && kCount <= 16);
  if constexpr (kIsBfloat16<T>) {
    FLASHMLA_NARROW_OF_TYPE("bf16");
  } else {
    FLASHMLA_NARROW_OF_TYPE("f16");
  }
}

#undef FLASHMLA_REGISTERS_4
#undef FLASHMLA_REGISTERS_8
#undef FLASHMLA_REGISTERS_12
#undef FLASHMLA_REGISTERS_16
#undef FLASHMLA_ACCUMULATORS_4
#undef FLASHMLA_ACCUMULATORS_8
#undef FLASHMLA_ACCUMULATORS_12
#undef FLASHMLA_ACCUMULATORS_16
#undef FLASHMLA_NARROW
#undef FLASHMLA_NARROW_OF_TYPE

}  // namespace flashmla::sm90
