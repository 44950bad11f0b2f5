// The two warpgroups of the values, each with half of the columns: Oᵀ += Vᵀ Pᵀ and the output.
// Numbers in brackets are the steps in README.md.
#pragma once

#include "epilogue.cuh"
#include "scores.cuh"

namespace flashmla::decode_few {

template <class T, int kRows, bool kSerial>
class Values {
 public:
  using Storage = decode_few::Storage<kRows>;
  static constexpr int kFirstTiles = 3;  // of a half, waited for apart from the other one

  __device__ Values(Storage& storage, const Arguments& a, int kv_head, int half)
      : storage_(storage),
        barriers_(storage.small.barriers),
        a_(a),
        kv_head_(kv_head),
        half_(half) {}

  __device__ __forceinline__ void run(const PartRange& part) {
    for (int request = part.begin_request; decode::in_part(part, a_.params.batch, request);
         ++request, ++item_count_) {
      const uint32_t buffer = item_count_ % 2;
      sm90::barrier_wait(barriers_.query_full[buffer], item_count_ / 2 % 2);
      const decode::Assignment& assignment = storage_.small.assignments[buffer];
      begin_item();
      const int pages = assignment.item.end_page - assignment.item.begin_page;
      for (int page = 1; page < pages; ++page) {
        issue_page();
        finish_page();
      }
      // Read no sooner: registers are scarce.
      const Target target(a_, kv_head_, request, assignment.destination);
      pages > 0 ? last_page(target) : no_page(target);
      release(barriers_.query_empty[buffer]);
    }
  }

 private:
  __device__ __forceinline__ void begin_item() {
#pragma unroll
    for (auto& tile : out_) {
#pragma unroll
      for (float& value : tile) value = 0.f;
    }
    sm90::random_delay(a_.params.delay_seed);
  }

  // Oᵀ += Vᵀ Pᵀ of a page.
  __device__ __forceinline__ void issue_page() {
    Operands operands = find_page();
    rescale();  // [4]
    ++page_count_;
    pin_out();
    sm90::wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile) {  // [5]
      add_tile(tile, operands);
      if (tile == kFirstTiles - 1 || tile == kHalfTiles - 1) sm90::wgmma_commit();
    }
  }

  // Descriptors of a page's operands.
  struct Operands {
    uint64_t weights;
    uint64_t values[kHalfTiles];
  };

  // Before the weights are awaited: the compiler would spend these 200 clocks behind.
  __device__ __forceinline__ Operands find_page() {
    if (page_count_ == 0) position_.advance(first_slot(storage_));
#pragma unroll
    for (uint32_t& slot : slots_) {
      slot = position_.slot;
      position_.advance();
    }
    Operands operands;
    operands.weights = sm90::k_major_descriptor(
        sm90::shared_address(storage_.parts[slots_[kPageParts - 1]][kPartTiles - 1]));
    sm90::hide_descriptor(operands.weights);
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile) {
      const int right = kHalfTiles + tile;
      const uint8_t* const keys =
          is_left() ? storage_.parts[slots_[tile / kPartTiles]][tile % kPartTiles]
                    : storage_.parts[slots_[right / kPartTiles]][right % kPartTiles];
      operands.values[tile] = sm90::mn_major_descriptor(sm90::shared_address(keys));
      sm90::hide_descriptor(operands.values[tile]);
    }
    return operands;
  }

  // Follows the page's references. Skipped by a warp none of whose rows needs it.
  __device__ __forceinline__ void rescale() {
    const uint32_t slot = page_count_ % kWeightSlots;
    sm90::barrier_wait(barriers_.weights_ready[slot], page_count_ / kWeightSlots % 2);
    RowValues<kRows> factors;
    load_rows<kRows>(factors, storage_.small.factors[slot]);
    bool same = true;
#pragma unroll
    for (const auto& pair : factors) same = same && pair[0] == 1.f && pair[1] == 1.f;
    if (!__all_sync(~0u, same)) {
#pragma unroll
      for (auto& tile : out_) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) tile[i] *= factors[i / 4][i % 2];
      }
    }
  }

  __device__ __forceinline__ void add_tile(int tile, const Operands& operands) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      sm90::wgmma_narrow<T, true>(out_[tile], operands.values[tile] + step * sm90::kStepDownRows,
                                  operands.weights + step * sm90::kStepAlongRow, true);
      after_wgmma<kSerial>(out_[tile]);
    }
  }

  // A part is freed as soon as its columns are done: the first by the left half's first tiles, the
  // second by its other tile and the right half's first ones, which have no columns of the first.
  __device__ __forceinline__ void finish_page() {
    static_assert(kPageParts == 3 && kFirstTiles == kPartTiles);
    sm90::wgmma_wait<1>();
    release(barriers_.part_empty[slots_[0]]);
    if (!is_left()) release(barriers_.part_empty[slots_[1]]);
    sm90::wgmma_wait<0>();
    pin_out();
    if (is_left()) release(barriers_.part_empty[slots_[1]]);
    release(barriers_.part_empty[slots_[2]]);
  }

  // The output takes the place of the item's last page.
  __device__ __forceinline__ void last_page(const Target& target) {
    issue_page();
    Stage stage;
#pragma unroll
    for (int part = 0; part < kPageParts; ++part) {
      stage.parts[part] = sm90::shared_address(storage_.parts[slots_[part]]);
    }
    const float factor = wait_for_sums();  // [7]
    sm90::wgmma_wait<0>();
    pin_out();
    target.whole() ? store_whole(stage, target, factor) : store_split(stage, target, factor);
#pragma unroll
    for (const uint32_t slot : slots_) release(barriers_.part_empty[slot]);
  }

  // As T, rows times `factor`, which each lane has of its row.
  __device__ __forceinline__ void store_whole(const Stage& stage, const Target& target,
                                              float factor) {
    meet();  // all are done with the page's values
    store_as<T>(stage, target, factor);
  }

  // As float16, a row scaled by its largest value among all warps' columns.
  __device__ __forceinline__ void store_split(const Stage& stage, const Target& target,
                                              float factor) {
    RowValues<kRows> most;
    warp_magnitudes<kRows>(out_, most);
    if (speaks_for_rows()) store_rows<kRows>(storage_.small.magnitudes[warp()], most);
    meet();  // all are done with the page's values, and magnitudes are there
    const float scale = decode::partial_scale(max_warps(storage_.small.magnitudes) * factor);
    const int row = static_cast<int>(threadIdx.x % 32);
    if (warp() == 0 && row < target.rows() && target.exists()) {
      // What undoes it. Combine wants it for each half of the columns.
      float (&inverse)[2] = target.partial(row).scale;
      inverse[0] = inverse[1] = decode::inverse_power(scale);
    }
    store_as<__half>(stage, target, factor * scale);
  }

  // Eight rows are stored, which takes a clock for each 32 bytes, while the next are staged.
  template <class Element>
  __device__ __forceinline__ void store_as(const Stage& stage, const Target& target, float factor) {
    RowValues<kRows> factors;
    spread_rows<kRows>(factors, factor);
#pragma unroll
    for (int block = 0; block < kRows / 8; ++block) {
#pragma unroll
      for (int tile = 0; tile < kHalfTiles; tile += 2) {  // [8]
        stage_rows<Element, kRows>(stage, out_, tile, half_ * kHalfTiles + tile, block,
                                   factors[block]);
      }
      if (block == kRows / 8 - 1) sm90::async_proxy_fence();  // TMA will write there next
      meet();
      const int row = block * 8 + warp();
      if (row < target.rows() && target.exists()) store_row_staged(stage, target, row);  // [9]
    }
  }

  __device__ static __forceinline__ int warp() {
    return static_cast<int>(threadIdx.x) / 32 - kWarpsPerWarpgroup;
  }
  __device__ static __forceinline__ void meet() {
    sm90::named_barrier_sync(kValuesMeet, kValueWarps * 32);
  }
  __device__ __forceinline__ bool is_left() const { return half_ == 0; }

  __device__ __forceinline__ void no_page(const Target& target) {
    wait_for_sums();
    if (target.exists()) store_zeros(target);
  }

  // What the lane's row is to be multiplied by in the end; 0 without keys.
  __device__ __forceinline__ float wait_for_sums() {
    const uint32_t buffer = item_count_ % 2;
    sm90::barrier_wait(barriers_.sums_ready[buffer], item_count_ / 2 % 2);
    return decode::inverse_sum(add_warps(storage_.small.row_sum[buffer]));
  }

  __device__ __forceinline__ void pin_out() {
#pragma unroll
    for (auto& tile : out_) sm90::pin_registers(tile);
  }

  Storage& storage_;
  Barriers<Storage::kSlots>& barriers_;
  const Arguments& a_;
  const int kv_head_;
  const int half_;
  RingPosition<Storage::kSlots> position_;
  uint32_t slots_[kPageParts];  // of the page at hand
  uint32_t page_count_ = 0;
  uint32_t item_count_ = 0;
  float out_[kHalfTiles][kRows / 2];
};

}  // namespace flashmla::decode_few
