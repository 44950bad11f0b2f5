// Warpgroup matrix multiply-accumulate of few columns and of any number that the projections have:
// 64 x N x 16, N = 8, 16, 24, 32, 64 or 128, both operands in shared memory, for bf16 and fp16. N
// is taken from the accumulators: N / 2 of them.
#pragma once

#include "wgmma.cuh"

namespace flashmla::sm90 {

// clang-format off
#define FLASHMLA_REGISTERS_4 "%0, %1, %2, %3"
#define FLASHMLA_REGISTERS_8 FLASHMLA_REGISTERS_4 ", %4, %5, %6, %7"
#define FLASHMLA_REGISTERS_12 FLASHMLA_REGISTERS_8 ", %8, %9, %10, %11"
#define FLASHMLA_REGISTERS_16 FLASHMLA_REGISTERS_12 ", %12, %13, %14, %15"
#define FLASHMLA_REGISTERS_32 FLASHMLA_REGISTERS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHMLA_REGISTERS_64 FLASHMLA_REGISTERS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHMLA_ACCUMULATORS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FLASHMLA_ACCUMULATORS_8 \
  FLASHMLA_ACCUMULATORS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FLASHMLA_ACCUMULATORS_12 \
  FLASHMLA_ACCUMULATORS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FLASHMLA_ACCUMULATORS_16 \
  FLASHMLA_ACCUMULATORS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FLASHMLA_ACCUMULATORS_32 \
  FLASHMLA_ACCUMULATORS_16, \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
  "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FLASHMLA_ACCUMULATORS_64 \
  FLASHMLA_ACCUMULATORS_32, \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
  "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), \
  "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

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

#undef FLASHMLA_REGISTERS_4
#undef FLASHMLA_REGISTERS_8
#undef FLASHMLA_REGISTERS_12
#undef FLASHMLA_REGISTERS_16
#undef FLASHMLA_REGISTERS_32
#undef FLASHMLA_REGISTERS_64
#undef FLASHMLA_ACCUMULATORS_4
#undef FLASHMLA_ACCUMULATORS_8
#undef FLASHMLA_ACCUMULATORS_12
#undef FLASHMLA_ACCUMULATORS_16
#undef FLASHMLA_ACCUMULATORS_32
#undef FLASHMLA_ACCUMULATORS_64
#undef FLASHMLA_NARROW
#undef FLASHMLA_NARROW_OF_TYPE

}  // namespace flashmla::sm90
