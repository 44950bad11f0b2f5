// The two math roles. Numbers in brackets are the steps of the schedule in README.md.
#pragma once

#include "../sm90/copy.cuh"
#include "epilogue.cuh"
#include "gemm.cuh"
#include "load.cuh"

namespace flashmla::decode {

// Both halves run the same instructions, so that these are fetched once and stay in the SM's cache:
// what differs is chosen by `half`, the same for a whole warpgroup.
template <class T, bool kSerial>
class Math {
 public:
  __device__ Math(Storage& storage, const Arguments& a, const BlockPlace& place, int half)
      : storage_(storage),
        barriers_(storage.barriers),
        a_(a),
        place_(place),
        half_(half),
        query_(sm90::k_major_descriptor(sm90::shared_address(storage.query))) {}

  __device__ __forceinline__ void run() {
    const PartRange& part = storage_.part;
    for (int request = part.begin_request; in_part(part, a_.params.batch, request); ++request) {
      sm90::barrier_wait(barriers_.query_full, item_parity_);
      const Assignment& assignment = storage_.assignments[item_parity_];
      const WorkItem item = assignment.item;
      begin_item();
      if (item.begin_page < item.end_page) {
        attend(item);
        position_.count += item.end_page - item.begin_page;
      } else {
        release(barriers_.query_empty);
      }
      end_item(item, assignment.destination);
    }
  }

 private:
  // A half's steps for pairs of pages, an even and an odd one, if there is one: the even one is the
  // left half's own, the odd one the right half's.
  __device__ __forceinline__ void attend(const WorkItem& item) {
    PagePosition even = position_;
    for (int page = item.begin_page; page < item.end_page; page += 2, even.count += 2) {
      const PagePosition odd = {even.count + 1};
      const bool has_odd = page + 1 < item.end_page;
      Rescaling own, others;
      if (is_left() || has_odd) {
        const PagePosition position = is_left() ? even : odd;
        compute_scores(position);  // [1] [2]
        release_scored(page + 2 >= item.end_page, even);
        own = weigh_own(item, is_left() ? page : page + 1, position, others);  // [3] [5]
      } else {
        release(barriers_.query_empty);
        others = hear_weights();
      }
      multiply(is_left(), chosen(is_left(), own, others), even);  // [4] [6]
      if (!has_odd) break;
      if (is_left()) others = hear_weights();
      multiply(!is_left(), chosen(is_left(), others, own), odd);  // [7] [8]
    }
  }

  // By value: chosen by reference, both would be in local memory.
  __device__ static __forceinline__ Rescaling chosen(bool first, const Rescaling& a,
                                                     const Rescaling& b) {
    return {first ? a.any : b.any,
            {first ? a.factor[0] : b.factor[0], first ? a.factor[1] : b.factor[1]}};
  }

  // What nobody needs any more once the scores are known.
  __device__ __forceinline__ void release_scored(bool last, PagePosition even) {
    release(is_left() ? barriers_.page_empty[even.slot()][kRope] : barriers_.odd_scored);
    if (last) release(barriers_.query_empty);
  }

  // Scores of this half's own page to weights, for both halves. The first tokens' are stored while
  // the last ones' are computed; that they follow what the even page did to the references, the
  // right half hears only when it has them.
  __device__ __forceinline__ Rescaling weigh_own(const WorkItem& item, int page,
                                                 PagePosition position, Rescaling& others) {
    // Chosen here: where it is stored to, ptxas makes 12 instructions more of it, 1 to 3% slower.
    uint8_t (&into)[sm90::kTileBytes] =
        is_left() ? storage_.even_weights : storage_.pages[position.slot()][kRopeTile];
    prepare(item, page, position);
    bool moves = softmax_.unset;
    if (!moves) {
      moves = softmax_.template weigh<T>(kFirstTokens, scores_, a_.scale_log2, weights_);
      wait_for_rope_tile();
      store_weights(into, kFirstTokens);
      moves |= softmax_.template weigh<T>(kLastTokens, scores_, a_.scale_log2, weights_);
      store_weights(into, kLastTokens);
      sm90::async_proxy_fence();
    }
    const bool told = !is_left() && told_of_move();
    Rescaling own;
    if (__any_sync(~0u, moves || told)) {
      if (!is_left()) others = follow_others(told);
      own = softmax_.template move<T>(scores_, a_.scale_log2, weights_);
      wait_for_rope_tile();
      store_weights(into, kFirstTokens);
      store_weights(into, kLastTokens);
      sm90::async_proxy_fence();
    }
    if (!is_left()) scored_parity_ ^= 1;
    publish_weights(own);
    softmax_.add_page();
    return own;
  }

  // The right half's weights go there when all of its warps have their scores.
  __device__ __forceinline__ void wait_for_rope_tile() {
    if (!is_left()) sm90::barrier_wait(barriers_.odd_scored, scored_parity_);
  }

  // O *= factor; O += P V of a page: P from registers of this half's own, from shared memory of the
  // other one's. Frees what it has read last.
  __device__ __forceinline__ void multiply(bool own, Rescaling rescaling, PagePosition position) {
    if (rescaling.any) rescale(out_, rescaling.factor);
    uint64_t values = sm90::mn_major_descriptor(
        sm90::shared_address(storage_.pages[position.slot()][half_ * kHalfTiles]));
    uint64_t weights = sm90::k_major_descriptor(sm90::shared_address(
        is_left() ? storage_.pages[position.slot()][kRopeTile] : storage_.even_weights));
    sm90::hide_descriptor(values);
    sm90::hide_descriptor(weights);
    sm90::pin_registers(out_);
    // Fence and commit once for both: ptxas would put a wait before the products (C7519).
    if (own) {
      sm90::wgmma_fence();
      add_values<T, kSerial>(out_, weights_, values);
      sm90::wgmma_commit();
    } else {
      sm90::wgmma_fence();
      add_values<T, kSerial>(out_, weights, values);
      sm90::wgmma_commit();
    }
    sm90::wgmma_wait<0>();
    sm90::pin_registers(out_);
    release(barriers_.page_empty[position.slot()][half_]);
    if (is_left() && !own) release(barriers_.page_empty[position.slot()][kRope]);
  }

  __device__ __forceinline__ void begin_item() {
    softmax_ = Softmax();
#pragma unroll
    for (float& value : out_) value = 0.f;
    sm90::random_delay(a_.params.delay_seed);
  }

  // S = Q Kᵀ of a page, as its boxes arrive.
  __device__ __forceinline__ void compute_scores(PagePosition position) {
    const uint32_t slot = position.slot();
    uint64_t query = query_;
    uint64_t page = sm90::k_major_descriptor(sm90::shared_address(storage_.pages[slot]));
    sm90::hide_descriptor(query);
    sm90::hide_descriptor(page);
    sm90::pin_registers(scores_);
#pragma unroll
    for (int box = 0; box < kPageBoxes; ++box) {
      sm90::barrier_wait(barriers_.page_full[slot][box], position.parity());
      sm90::wgmma_fence();
      add_scores<T, kSerial>(scores_, query, page, box_tiles(box));
    }
    sm90::wgmma_commit();
    sm90::wgmma_wait<0>();
    sm90::pin_registers(scores_);
  }

  // Where the page reaches beyond what can be seen: scores masked, V ready to be multiplied.
  __device__ __forceinline__ void prepare(const WorkItem& item, int page, PagePosition position) {
    const int first_key = page * kPageSize;
    sm90::random_delay(a_.params.delay_seed);
    if (first_key + kPageSize > visible_keys(item.length, 0, a_.params.s_q, a_.params.causal)) {
      mask(item, first_key);
      // Other warps may still multiply by this page's keys: what they see of the zeros is masked.
      if (first_key + kPageSize > item.length) {
        zero_values(position.slot(), item.length - first_key);
        sm90::async_proxy_fence();
        meet_own_warps();
      }
    }
  }

  __device__ __forceinline__ void mask(const WorkItem& item, int first_key) {
    int limit[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int query = a_.by_heads_per_kv.quotient(place_.first_row + fragment_row(which));
      limit[which] = visible_keys(item.length, query, a_.params.s_q, a_.params.causal);
    }
    mask_scores(scores_, first_key, limit);
  }

  __device__ __forceinline__ void meet_own_warps() {
    if (is_left()) {  // a barrier known only at run time would take all sixteen
      sm90::named_barrier_sync(kOwnWarps + kLeftHalf, kWarpgroup);
    } else {
      sm90::named_barrier_sync(kOwnWarps + kRightHalf, kWarpgroup);
    }
  }

  // Tells the other half of the weights, and of the references if they moved.
  __device__ __forceinline__ void publish_weights(const Rescaling& own) {
    if (speaks_for_rows()) {
      if (own.any) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          storage_.reference[half_][fragment_row(which)] = softmax_.reference[which];
        }
      }
    }
    if (threadIdx.x % 32 == 0) storage_.reference_moved[half_][own_warp()] = own.any;
    __syncwarp();
    if (speaks_for_rows()) sm90::barrier_arrive(barriers_.weights_ready[half_]);
  }

  // Waits for the other half's weights; for a lane that speaks for rows, whether they moved its
  // warp's references.
  __device__ __forceinline__ bool told_of_move() {
    sm90::barrier_wait(barriers_.weights_ready[other()], other_parity_);
    other_parity_ ^= 1;
    return speaks_for_rows() && storage_.reference_moved[other()][own_warp()];
  }

  __device__ __forceinline__ Rescaling follow_others(bool told) {
    Rescaling others = {__any_sync(~0u, told) != 0};
    if (others.any) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        others.factor[which] = softmax_.follow(which, heard(storage_.reference[other()], which));
      }
      softmax_.note_unset();
    }
    return others;
  }

  __device__ __forceinline__ Rescaling hear_weights() { return follow_others(told_of_move()); }

  __device__ static __forceinline__ int own_warp() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsPerWarpgroup;
  }

  // The page's keys from `first` on are not the request's: 0 weight times NaN would be NaN.
  __device__ __forceinline__ void zero_values(uint32_t slot, int first) {
    constexpr int kChunksPerRow = 2 * kHalfTiles * 8;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    for (int i = thread; i < (kPageSize - first) * kChunksPerRow; i += kWarpgroup) {
      const int row = first + i / kChunksPerRow;
      uint8_t* const tile = storage_.pages[slot][i % kChunksPerRow / 8];
      *reinterpret_cast<uint4*>(tile + sm90::swizzled_chunk(row, i % 8)) = make_uint4(0, 0, 0, 0);
    }
  }

  // A group's weights to shared memory, for the other half.
  __device__ __forceinline__ void store_weights(uint8_t (&into)[sm90::kTileBytes],
                                                TokenGroup tokens) {
    const uint32_t tile = sm90::shared_address(into);
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t row = threadIdx.x / 32 % kWarpsPerWarpgroup * 16 + lane % 16;
#pragma unroll
    for (uint32_t step = tokens * 2; step < tokens * 2 + 2u; ++step) {
      sm90::store_matrix_x4(tile + sm90::swizzled_chunk(row, step * 2 + lane / 16), weights_[step]);
    }
  }

  __device__ __forceinline__ void end_item(const WorkItem& item, int destination) {
    RowEnds ends = {};
    if (item.begin_page < item.end_page) {  // [9]
      softmax_.reduce_sums();
      float (*const sums)[kRowTile] = storage_.row_sum[item_parity_];
      if (speaks_for_rows()) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          sums[half_][fragment_row(which)] = softmax_.row_sum[which];
        }
        sm90::barrier_arrive(barriers_.sums_ready);
      }
      if (destination >= 0) {  // while the other half's sums come
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          ends.magnitude[which] = row_magnitude(out_, which);
        }
      }
      sm90::barrier_wait(barriers_.sums_ready, sums_parity_);
      sums_parity_ ^= 1;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        ends.reference[which] = softmax_.reference[which];
        ends.total[which] = softmax_.row_sum[which] + heard(sums[other()], which);
      }
    }
    item_parity_ ^= 1;
    store_item<T>(a_, place_, item.request, destination, half_, out_, ends);
  }

  __device__ __forceinline__ bool is_left() const { return half_ == kLeftHalf; }
  __device__ __forceinline__ int other() const { return half_ ^ 1; }

  // Of the four lanes that hold a row, the one that exchanges its reference and sum, and arrives.
  __device__ static __forceinline__ bool speaks_for_rows() { return threadIdx.x % 4 == 0; }

  // The other half's value for this thread's row, through the lane that speaks for it.
  __device__ static __forceinline__ float heard(const float (&values)[kRowTile], int which) {
    const float value = speaks_for_rows() ? values[fragment_row(which)] : 0.f;
    return __shfl_sync(~0u, value, 0, 4);
  }

  // Each warp arrives once all its lanes are done.
  template <class... SomeBarriers>
  __device__ __forceinline__ void release(SomeBarriers&... barriers) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) (sm90::barrier_arrive(barriers), ...);
  }

  Storage& storage_;
  Barriers& barriers_;
  const Arguments& a_;
  const BlockPlace place_;
  const int half_;
  const uint64_t query_;
  PagePosition position_;
  uint32_t item_parity_ = 0;    // of query_full, the assignment and row_sum
  uint32_t sums_parity_ = 0;    // of sums_ready: once per item with pages
  uint32_t scored_parity_ = 0;  // of odd_scored
  uint32_t other_parity_ = 0;   // of the other half's weights_ready
  Softmax softmax_;
  float scores_[32];
  float out_[128];
  Weights weights_;
};

}  // namespace flashmla::decode
