// Moving registers between warpgroups: a role gives up what it does not need before the math
// roles ask for more. Each role must be one branch of a single if/else.
#pragma once

namespace flashmla::sm90 {

template <int kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace flashmla::sm90
