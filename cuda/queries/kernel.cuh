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

  __device__ __forceinline__ void run() {
    // [1] Of what fills the ring at first, the kernel ahead can still be making x.
    const int ahead = min(share_.begin_step + Storage::kStages, share_.end_step);
    RingPosition<Storage::kStages> position_of_x;
    for (int step = share_.begin_step; step < ahead; ++step) load_weights(step);
    sm90::wait_for_previous_kernel();
    for (int step = share_.begin_step; step < share_.end_step; ++step) {
      if (step >= ahead) load_weights(step);
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
__device__ __forceinline__ void init_barriers(Storage& storage, const Share& share) {
  for (int stage = 0; stage < Storage::kStages; ++stage) {
    sm90::barrier_init(storage.barriers.full[stage], 1);
    sm90::barrier_init(storage.barriers.empty[stage], Storage::kGroups * kWarpsPerGroup);
  }
  sm90::barrier_init(storage.barriers.columns_ready, 1);
  sm90::barrier_init(storage.barriers.queries_ready, 1);
  sm90::barrier_init_fence();
  // What the other blocks of a cluster copy here.
  const uint32_t others = Storage::kColumns / share.splits * (share.splits - 1);
  sm90::barrier_arrive_expect(storage.barriers.columns_ready, others * Storage::kColumnBytes);
  sm90::barrier_arrive_expect(storage.barriers.queries_ready, others / 8 * Storage::kVectorBytes);
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
  if (warp == Storage::kGroups * kWarpsPerGroup) {
    const bool first = threadIdx.x % 32 == 0;
    if (first) init_barriers(storage, share);
    __syncwarp();
    sm90::named_barrier_arrive(kBegun, kThreads<kNopeTiles>);  // it need not wait for the others
    sm90::allow_next_kernel();
    if constexpr (kSplits) sm90::cluster_arrive();
    if (first) Producer<kNopeTiles, kTokens, kSplits>(storage, arguments, share).run();
    __syncwarp();
    if constexpr (kSplits) {
      sm90::cluster_wait();
      sm90::cluster_arrive();
    }
  } else {
    sm90::named_barrier_sync(kBegun, kThreads<kNopeTiles>);
    sm90::allow_next_kernel();
    if constexpr (kSplits) sm90::cluster_arrive();
    Math<T, kNopeTiles, kTokens, kSplits>(storage, arguments.params, share).run();
  }
  if constexpr (kSplits) sm90::cluster_wait();  // nobody copies from this block any more
}

}  // namespace flashmla::queries
