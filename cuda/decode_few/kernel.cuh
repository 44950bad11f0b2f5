// The decode kernel for few query rows: its roles. README.md has the schedule that they follow.
#pragma once

#include "values.cuh"

namespace flashmla::decode_few {

// A part's row of the schedule, asked for but not looked at: whoever looks waits for it.
struct ScheduleRow {
  int4 cuts;
  int begin_split;

  __device__ __forceinline__ void ask(const Arguments& a, int part) {
    const int4* const row = reinterpret_cast<const int4*>(a.params.tile_scheduler_metadata) +
                            static_cast<long long>(part) * (kScheduleColumns / 4);
    cuts = row[0];
    begin_split = reinterpret_cast<const int*>(row + 1)[0];
  }
  // The compiler would clamp the values where they are asked for, and every warp wait there.
  __device__ __forceinline__ PartRange look(const Arguments& a) {
    sm90::pin_integers(cuts.x, cuts.y, cuts.z, cuts.w, begin_split);
    const int row[] = {cuts.x, cuts.y, cuts.z, cuts.w, begin_split};
    return decode::read_part(row, a.params.batch);
  }
};

// Each warp initialises some: one after the other takes 60 clocks each.
template <int kSlots>
__device__ __forceinline__ void init_barriers(Barriers<kSlots>& barriers, int warp) {
  constexpr int kCount = sizeof(barriers) / sizeof(sm90::Barrier);
  if (threadIdx.x % 32 == 0) {
    for (int i = warp; i < kCount; i += kThreads / 32) {
      sm90::barrier_init(barriers.part_full[i], arrivals<kSlots>(i));
    }
  }
  sm90::barrier_init_fence();
}

template <class T, int kRows, bool kSerial>
__global__ void __launch_bounds__(kThreads, 1)
    decode_few_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<Storage<kRows>*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int kv_head = static_cast<int>(blockIdx.y);
  const bool early = arguments.params.early_start;
  // Every thread asks for it: nobody waits for another one's word.
  ScheduleRow schedule_row;
  if (!early) schedule_row.ask(arguments, static_cast<int>(blockIdx.x));

  if (threadIdx.x == kQueryLoaderWarp * 32) {
    sm90::tma_prefetch_map(arguments.query_latent_map);
    sm90::tma_prefetch_map(arguments.page_map);
    sm90::tma_prefetch_map(arguments.query_rope_map);
  }
  if (!early && warp == 0) {
    decode::prefetch_table(arguments, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  }
  sm90::fill_with_nan(shared_bytes, sizeof(storage));
  init_barriers(storage.small.barriers, warp);
  clear_padding(storage, arguments.rows, warp);
  Guess guess;
  if (warp == kProducerWarp) guess = look_ahead<kRows>(arguments, kv_head);
  if (early) {
    sm90::wait_for_previous_kernel();
    schedule_row.ask(arguments, static_cast<int>(blockIdx.x));
  }
  __syncthreads();
  sm90::allow_next_kernel();
  const PartRange part = schedule_row.look(arguments);

  if (warp < kWarpsPerWarpgroup) {
    Scores<T, kRows, kSerial>(storage, arguments, kv_head).run(part);
  } else if (warp < kProducerWarp) {
    const int half = warp / kWarpsPerWarpgroup - 1;
    Values<T, kRows, kSerial>(storage, arguments, kv_head, half).run(part);
  } else if (warp == kProducerWarp) {
    stream_pages(storage, arguments, kv_head, part, guess);
  } else {
    load_queries(storage, arguments, kv_head, part);
  }
}

}  // namespace flashmla::decode_few
