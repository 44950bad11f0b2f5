// Warpgroup matrix multiply-accumulate: the three shapes of the decode kernel, for bf16 and fp16.
//
// The instruction takes each accumulator register as an operand, so the operand lists below are as
// long as the tiles are wide. Everything else in the project calls the functions at the end.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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
#define FLASHMLA_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHMLA_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHMLA_ACCUMULATORS_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
  "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
  "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FLASHMLA_ACCUMULATORS_128 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
  "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
  "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
  "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), \
  "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), \
  "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), \
  "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), \
  "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), \
  "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), \
  "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
  "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), \
  "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
  "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), \
  "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
  "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), \
  "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

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

#undef FLASHMLA_REGISTERS_32
#undef FLASHMLA_REGISTERS_128
#undef FLASHMLA_ACCUMULATORS_32
#undef FLASHMLA_ACCUMULATORS_128
#undef FLASHMLA_SCORES
#undef FLASHMLA_VALUES_SHARED
#undef FLASHMLA_VALUES_REGISTERS

}  // namespace flashmla::sm90
