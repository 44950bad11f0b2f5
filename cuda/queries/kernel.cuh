// The absorbed query projection of a head: x W_Q, rotation, W_UK. README.md has the schedule that
// the numbers in brackets name.
#pragma once

#include "../sm90/copy.cuh"
#include "arguments.h"
#include "math.cuh"

namespace flashmla::queries {

// One thread: what the ring is filled with, first steps of the width, then tiles of W_UK.
template <int kNopeTiles, int kTokens, bool kSplits>
class Producer {
 public:
  using Storage = queries::Storage<kNopeTiles, kTokens, kSplits>;

  __device__ Producer(Storage& storage, const Arguments& a, const Share& share)
      : storage_(storage), a_(a), share_(share) {}

  // [1] Of what fills the ring at first, the kernel ahead can still be making x.
  __device__ __forceinline__ void begin() {
    for (int step = share_.begin_step; step < ahead(); ++step) load_weights(step);
  }

  __device__ __forceinline__ void run() {
    RingPosition<Storage::kStages> position_of_x;
    sm90::wait_for_previous_kernel();
    for (int step = share_.begin_step; step < share_.end_step; ++step) {
      if (step >= ahead()) load_weights(step);
      sm90::tma_load_4d(sm90::shared_address(storage_.x[position_of_x.slot]), a_.x_map,
                        storage_.barriers.full[position_of_x.slot], 0, share_.first_token, step, 0);
      position_of_x.advance();
    }
    for (int tile = share_.begin_tile; tile < share_.end_tile; ++tile) {  // [6]
      sm90::Barrier& full = next_stage(kNopeTiles * sm90::kTileBytes);
      sm90::tma_load_4d(sm90::shared_address(storage_.weights[position_.slot]), a_.key_up_map, full,
                        0, 0, tile, share_.head);
      position_.advance();
    }
  }

 private:
  // The end of the steps that fill the ring at first.
  __device__ __forceinline__ int ahead() const {
    return min(share_.begin_step + Storage::kStages, share_.end_step);
  }

  // The weights of 64 columns of x; the stage waits for these, too.
  __device__ __forceinline__ void load_weights(int step) {
    sm90::Barrier& full = next_stage(Storage::kStageBytes);
    const uint32_t weights = sm90::shared_address(storage_.weights[position_.slot]);
    if (share_.is_down) {
      sm90::tma_load_4d(weights, a_.down_map, full, 0, step * kTile, share_.head * Storage::kGroups,
                        0);
    } else {
      sm90::tma_load_4d(weights, a_.query_up_map, full, 0, step * kTile, 0, share_.head);
    }
    position_.advance();
  }

  __device__ __forceinline__ sm90::Barrier& next_stage(uint32_t bytes) {
    sm90::barrier_wait(storage_.barriers.empty[position_.slot], position_.parity ^ 1);
    sm90::Barrier& full = storage_.barriers.full[position_.slot];
    sm90::barrier_arrive_expect(full, bytes);
    return full;
  }

  Storage& storage_;
  const Arguments& a_;
  const Share& share_;
  RingPosition<Storage::kStages> position_;
};

template <class Storage>
__device__ __forceinline__ void init_ring(Storage& storage) {
  for (int stage = 0; stage < Storage::kStages; ++stage) {
    sm90::barrier_init(storage.barriers.full[stage], 1);
    sm90::barrier_init(storage.barriers.empty[stage], Storage::kGroups * kWarpsPerGroup);
  }
}

// Where blocks share a head: what the others copy here, and that nobody copies from here any more.
template <class Storage>
__device__ __forceinline__ void init_exchange(Storage& storage, int others) {
  sm90::barrier_init(storage.barriers.columns_ready, 1);
  sm90::barrier_init(storage.barriers.queries_ready, 1);
  sm90::barrier_init(storage.barriers.may_leave, others);
  const uint32_t columns = Storage::kColumns / (others + 1) * others;
  sm90::barrier_arrive_expect(storage.barriers.columns_ready, columns * Storage::kColumnBytes);
  sm90::barrier_arrive_expect(storage.barriers.queries_ready, columns / 8 * Storage::kVectorBytes);
}

template <class T, int kNopeTiles, int kTokens, bool kSplits>
__global__ void __launch_bounds__(kThreads<kNopeTiles>, 1)
    queries_kernel(const __grid_constant__ Arguments arguments) {
  using Storage = queries::Storage<kNopeTiles, kTokens, kSplits>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<Storage*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const Share share(arguments, kTokens);

  sm90::fill_with_nan(shared_bytes, sizeof(storage));
  sm90::allow_next_kernel();
  if (warp == Storage::kGroups * kWarpsPerGroup) {
    const bool first = threadIdx.x % 32 == 0;
    Producer<kNopeTiles, kTokens, kSplits> producer(storage, arguments, share);
    if (first) {
      init_ring(storage);
      if constexpr (kSplits) init_exchange(storage, share.splits - 1);
      sm90::barrier_init_fence();
    }
    __syncwarp();
    if constexpr (kSplits) {
      sm90::cluster_arrive();
    } else {
      sm90::named_barrier_arrive(kBegun, kThreads<kNopeTiles>);  // it waits for no other warp
    }
    if (first) producer.begin();
    __syncwarp();
    if constexpr (kSplits) sm90::cluster_wait();
    if (first) {
      producer.run();
      if constexpr (kSplits) sm90::barrier_wait(storage.barriers.may_leave, 0);
    }
  } else {
    if constexpr (kSplits) {
      sm90::cluster_arrive();
      sm90::cluster_wait();
    } else {
      sm90::named_barrier_sync(kBegun, kThreads<kNopeTiles>);
    }
    Math<T, kNopeTiles, kTokens, kSplits>(storage, arguments.params, share).run();
  }
}

}  // namespace flashmla::queries
