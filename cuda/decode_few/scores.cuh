// The scores warpgroup: Sᵀ = K Qᵀ and the softmax. Numbers in brackets are the steps in README.md.
#pragma once

#include "../sm90/wgmma_narrow.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "softmax.cuh"

namespace flashmla::decode_few {

template <bool kSerial, int kCount>
__device__ __forceinline__ void after_wgmma(float (&accumulators)[kCount]) {
  if constexpr (kSerial) {
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::pin_registers(accumulators);
    sm90::wgmma_fence();
  }
}

// Each warp arrives once all its lanes are done.
__device__ __forceinline__ void release(sm90::Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) sm90::barrier_arrive(barrier);
}

// Where in the ring the block's first page is.
template <int kRows>
__device__ __forceinline__ int first_slot(Storage<kRows>& storage) {
  sm90::barrier_wait(storage.small.barriers.first_known, 0);
  return static_cast<int>(storage.small.first_slot);
}

template <class T, int kRows, bool kSerial>
class Scores {
 public:
  using Storage = decode_few::Storage<kRows>;

  __device__ Scores(Storage& storage, const Arguments& a, int kv_head)
      : storage_(storage), barriers_(storage.small.barriers), a_(a), kv_head_(kv_head) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int query = a.by_heads_per_kv.quotient(fragment_query_row(i / 2) + i % 2);
      hidden_keys_[i / 2][i % 2] = -decode::visible_keys(0, query, a.params.s_q, a.params.causal);
    }
  }

  __device__ __forceinline__ void run(const PartRange& part) {
    for (int request = part.begin_request; decode::in_part(part, a_.params.batch, request);
         ++request) {
      const uint32_t buffer = item_count_ % 2;
      sm90::barrier_wait(barriers_.query_full[buffer], item_count_ / 2 % 2);
      const auto [item, destination] = storage_.small.assignments[buffer];
      softmax_.reset();
      sm90::random_delay(a_.params.delay_seed);
      for (int page = item.begin_page; page < item.end_page; ++page, ++page_count_) {
        if (page_count_ == 0) position_.advance(first_slot(storage_));
        compute();          // [1]
        weigh(item, page);  // [2]
        publish();          // [3]
        softmax_.add(scores_, factors_);
      }
      release(barriers_.query_empty[buffer]);
      end_item(Target(a_, kv_head_, request, destination));  // [6]
    }
  }

 private:
  // Sᵀ = K Qᵀ of a page, as its parts arrive. Leaves the position at the next page.
  __device__ __forceinline__ void compute() {
    uint64_t query =
        sm90::k_major_descriptor(sm90::shared_address(storage_.query[item_count_ % 2]));
    sm90::hide_descriptor(query);
    sm90::pin_registers(scores_);
#pragma unroll
    for (int part = 0; part < kPageParts; ++part, position_.advance()) {
      slots_[part] = position_.slot;
      uint64_t keys = sm90::k_major_descriptor(sm90::shared_address(storage_.parts[slots_[part]]));
      sm90::hide_descriptor(keys);
      sm90::barrier_wait(barriers_.part_full[position_.slot], position_.parity);
      sm90::wgmma_fence();
      add_part(query, keys, part);
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::pin_registers(scores_);
  }

  __device__ __forceinline__ void add_part(uint64_t query, uint64_t keys, int part) {
#pragma unroll
    for (int tile = 0; tile < kPartTiles; ++tile) {
      const uint64_t query_tile =
          query + (part * kPartTiles + tile) * sm90::descriptor_step(Storage::kQueryTileBytes);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        sm90::wgmma_narrow<T, false>(
            scores_, keys + tile * sm90::kStepTile + step * sm90::kStepAlongRow,
            query_tile + step * sm90::kStepAlongRow, part != 0 || tile != 0 || step != 0);
        after_wgmma<kSerial>(scores_);
      }
    }
  }

  // Scores to weights. Sets factors_ for the values.
  __device__ __forceinline__ void weigh(const WorkItem& item, int page) {
    const int first_key = page * kPageSize;
    sm90::random_delay(a_.params.delay_seed);
    if (first_key + kPageSize >
        decode::visible_keys(item.length, 0, a_.params.s_q, a_.params.causal)) {
      mask(item, first_key);
    }
    softmax_.follow(page_max(), a_.scale_log2, factors_);
    softmax_.weigh(scores_, a_.scale_log2);
    if (first_key + kPageSize > item.length) zero_values(item.length - first_key);
  }

  // Largest score of the lane's row. When it returns, all four warps have their scores.
  __device__ __forceinline__ float page_max() {
    auto& by_warp = storage_.small.page_max[page_count_ % 2];
    RowValues<kRows> most;
    softmax_.warp_max(scores_, most);
    if (speaks_for_rows()) store_rows<kRows>(by_warp[warp()], most);
    sm90::named_barrier_sync(kScoresMeet, kWarpgroup);
    return max_warps(by_warp);
  }

  // Keys from a row's limit on are invisible to it.
  __device__ __forceinline__ void mask(const WorkItem& item, int first_key) {
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const int limit = item.length - hidden_keys_[i / 4][i % 2];
      if (first_key + fragment_line(i / 2 % 2) >= limit) scores_[i] = kNegativeInfinity;
    }
  }

  // The page's keys from `first` on are not the request's: 0 weight times NaN would be NaN.
  __device__ __forceinline__ void zero_values(int first) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    for (int row = first + thread / 8; row < kPageSize; row += kWarpgroup / 8) {
      const uint32_t chunk = sm90::swizzled_chunk(row, thread % 8);
#pragma unroll
      for (int tile = 0; tile < 2 * kHalfTiles; ++tile) {
        uint8_t* const keys = storage_.parts[slots_[tile / kPartTiles]][tile % kPartTiles];
        *reinterpret_cast<uint4*>(keys + chunk) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Weights and factors to shared memory, for the values.
  __device__ __forceinline__ void publish() {
    const uint32_t slot = page_count_ % kWeightSlots;
    store_weights<T, kRows>(
        sm90::shared_address(storage_.parts[slots_[kPageParts - 1]][kPartTiles - 1]), scores_);
    sm90::async_proxy_fence();
    __syncwarp();
    if (speaks_for_rows()) {
      if (warp() == 0) store_rows<kRows>(storage_.small.factors[slot], factors_);
      sm90::barrier_arrive(barriers_.weights_ready[slot]);
    }
  }

  // Sums for the values; then lse.
  __device__ __forceinline__ void end_item(const Target& target) {
    const uint32_t buffer = item_count_++ % 2;
    auto& row_sum = storage_.small.row_sum[buffer];
    softmax_.reduce_sums();
    if (speaks_for_rows()) {
      store_rows<kRows>(row_sum[warp()], softmax_.row_sum);
      sm90::barrier_arrive(barriers_.sums_ready[buffer]);
    }
    sm90::named_barrier_sync(kScoresMeet, kWarpgroup);
    const int row = static_cast<int>(threadIdx.x);
    if (row >= target.rows() || !target.exists()) return;
    const float sum = add_warps(row_sum);
    target.lse(row) = sum == 0.f  // NaN is not empty
                          ? kNegativeInfinity
                          : (softmax_.reference + log2f(sum)) * decode::kLn2;
  }

  __device__ static __forceinline__ int warp() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsPerWarpgroup;
  }

  Storage& storage_;
  Barriers<Storage::kSlots>& barriers_;
  const Arguments& a_;
  const int kv_head_;
  RingPosition<Storage::kSlots> position_;
  uint32_t slots_[kPageParts];  // of the page at hand
  uint32_t page_count_ = 0;
  uint32_t item_count_ = 0;
  int hidden_keys_[kRows / 8][2];  // of the last ones, by the causal mask
  Softmax<kRows> softmax_;
  RowValues<kRows> factors_;
  float scores_[kRows / 2];
};

}  // namespace flashmla::decode_few
