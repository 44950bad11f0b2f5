// The decode kernel: roles and their registers. README.md has the schedule that they follow.
#pragma once

#include "../sm90/registers.cuh"
#include "early_start.cuh"
#include "math.cuh"

namespace flashmla::decode {

__device__ __forceinline__ void init_barriers(Barriers& barriers) {
  for (int slot = 0; slot < kPageSlots; ++slot) {
    for (sm90::Barrier& full : barriers.page_full[slot]) {
      sm90::barrier_init(full, kPageFullArrivals);
    }
    for (sm90::Barrier& empty : barriers.page_empty[slot]) {
      sm90::barrier_init(empty, kPageEmptyArrivals);
    }
  }
  sm90::barrier_init(barriers.query_full, kQueryFullArrivals);
  sm90::barrier_init(barriers.query_empty, kQueryEmptyArrivals);
  for (sm90::Barrier& ready : barriers.weights_ready) {
    sm90::barrier_init(ready, kWeightsReadyArrivals);
  }
  sm90::barrier_init(barriers.odd_scored, kOddScoredArrivals);
  sm90::barrier_init(barriers.sums_ready, kSumsReadyArrivals);
  sm90::barrier_init_fence();
}

template <class T, bool kSerial>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Storage& storage = *reinterpret_cast<Storage*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const BlockPlace place = block_place(arguments);

  sm90::fill_with_nan(shared_bytes, sizeof(Storage));
  const bool early = arguments.params.early_start;
  if (warp == 1) prefetch_first_pages(arguments, place);
  PartRange part;
  if (threadIdx.x == 0) {
    if (!early) part = read_part(arguments, place.part);  // its latency hides behind the rest
    for (const CUtensorMap* map : {&arguments.latent_map, &arguments.rope_map,
                                   &arguments.q_latent_map, &arguments.q_rope_map}) {
      sm90::tma_prefetch_map(*map);
    }
    init_barriers(storage.barriers);
  }
  if (early) sm90::wait_for_previous_kernel();
  if (threadIdx.x == 0) storage.part = early ? read_part(arguments, place.part) : part;
  __syncthreads();
  sm90::allow_next_kernel();

  if (warp < kWarpsPerWarpgroup) {
    sm90::release_registers<kProducerRegisters>();
    if (warp == 0) {
      stream_pages(storage, arguments, place);
    } else {
      load_queries(storage, arguments, place, warp - 1);
    }
  } else {
    sm90::acquire_registers<kMathRegisters>();
    Math<T, kSerial>(storage, arguments, place, warp / kWarpsPerWarpgroup - 1).run();
  }
}

}  // namespace flashmla::decode
