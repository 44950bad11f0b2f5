// Walks a ring of kSlots in shared memory: the slot to use, and the parity of its phase.
#pragma once

#include <cstdint>

namespace flashmla {

template <int kSlots>
struct RingPosition {
  uint32_t slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int slots = 1) {
    slot += slots;
    if (slot >= kSlots) {
      slot -= kSlots;
      parity ^= 1;
    }
  }
};

}  // namespace flashmla
