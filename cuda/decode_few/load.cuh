// The loading warps: the producer asks TMA for page parts, the query loader for queries, and says
// what each item is.
#pragma once

#include "../decode/early_start.cuh"
#include "../decode/load.cuh"
#include "../ring.cuh"
#include "../sm90/copy.cuh"
#include "arguments.h"
#include "storage.h"

namespace flashmla::decode_few {

// The block's first page as it seemed before the kernel ahead had ended. It is asked for when that
// has ended and the schedule's row has come, and looked up meanwhile: 0.5 of 8 us at 1 x 4096
// (H200). Without an early start it is the right one, and 0.1 to 0.3 us come sooner.
struct Guess {
  bool asked = false;
  int page_id = 0;
};
// With 32 rows the query, which is asked for later, has to wait for the page: 1% slower.
template <int kRows>
inline constexpr bool kGuesses = kRows <= 24;

// Asks for a part of a page. A page id outside the pool gives zeros.
template <int kRows>
__device__ __forceinline__ void request_part(Storage<kRows>& storage, const Arguments& a,
                                             int kv_head, int page_id, int part, uint32_t slot,
                                             uint64_t policy) {
  sm90::Barrier& full = storage.small.barriers.part_full[slot];
  sm90::barrier_arrive_expect(full, kPartBytes);
  sm90::tma_load_4d(sm90::shared_address(storage.parts[slot]), a.page_map, full, 0, 0,
                    kv_head * kQkTiles + part * kPartTiles, page_id, policy);
}

// A wrong guess lies in the first slots. Once this lane's part has landed, its slot is as if read.
template <int kRows>
__device__ __forceinline__ void discard_part(Storage<kRows>& storage, int lane) {
  auto& barriers = storage.small.barriers;
  if (lane < kPageParts) {
    sm90::barrier_wait(barriers.part_full[lane], 0);
    for (int i = 0; i < kPartEmptyArrivals; ++i) sm90::barrier_arrive(barriers.part_empty[lane]);
  }
  __syncwarp();
}

// Lane p of the producer asks for part p of every page, in a slot of its own, and waits for nobody
// else's. It asks when its part of the page before has arrived: more than a page on its way per
// block does not raise the bandwidth, but lets SMs near memory take it from the others.
template <int kRows>
__device__ __forceinline__ void stream_pages(Storage<kRows>& storage, const Arguments& a,
                                             int kv_head, const PartRange& part, Guess guess) {
  auto& barriers = storage.small.barriers;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint64_t policy = sm90::evict_first_policy();
  RingPosition<Storage<kRows>::kSlots> position;
  position.advance(lane % kPageParts);
  RingPosition<Storage<kRows>::kSlots> before;
  bool first = true;
  if (guess.asked && lane < kPageParts) {
    request_part(storage, a, kv_head, guess.page_id, lane, position.slot, policy);
  }
  for (int request = part.begin_request; decode::in_part(part, a.params.batch, request);
       ++request) {
    const int begin_page = request == part.begin_request ? part.begin_page : 0;
    decode::PageIds ids(a, request, decode::clamped(begin_page, 0, a.params.max_pages_per_seq));
    const WorkItem item = decode::read_item(a, part, request);
    for (int page = item.begin_page; page < item.end_page; ++page) {
      const int page_id = ids.get(page);
      sm90::random_delay(a.params.delay_seed);
      bool wanted = lane < kPageParts;
      if (first) {
        if (guess.asked && guess.page_id != page_id) {
          discard_part(storage, lane);
          position.advance(kPageParts);
          guess.asked = false;
        }
        if (lane == 0) {
          storage.small.first_slot = position.slot;
          sm90::barrier_arrive(barriers.first_known);
        }
        wanted = wanted && !guess.asked;
        guess.asked = false;
      }
      while (wanted) {
        if (!first && !sm90::barrier_try_wait(barriers.part_full[before.slot], before.parity)) {
          continue;
        }
        if (!sm90::barrier_try_wait(barriers.part_empty[position.slot], position.parity ^ 1)) {
          continue;
        }
        request_part(storage, a, kv_head, page_id, lane, position.slot, policy);
        wanted = false;
      }
      __syncwarp();
      first = false;
      before = position;
      position.advance(kPageParts);
    }
  }
  if (guess.asked) discard_part(storage, lane);
}

// Looks the first page up and, where that gains anything, brings it to L2.
template <int kRows>
__device__ __forceinline__ Guess look_ahead(const Arguments& a, int kv_head) {
  const int least = decode::least_to_prefetch(a);
  const decode::FirstPages pages(a, static_cast<int>(blockIdx.x), kGuesses<kRows> ? 1 : least);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int id = pages.first_id();
  if (lane < kPageParts && pages.count >= least) {
    sm90::tma_prefetch_4d(a.page_map, 0, 0, kv_head * kQkTiles + lane * kPartTiles, id,
                          sm90::evict_first_policy());
  }
  return {kGuesses<kRows> && pages.count > 0, sm90::spoil_guess(id, a.params.delay_seed)};
}

// A request's rows of Q.
template <int kRows>
__device__ __forceinline__ void request_query(Storage<kRows>& storage, const Arguments& a,
                                              int kv_head, int request, uint32_t buffer) {
  sm90::Barrier& full = storage.small.barriers.query_full[buffer];
  auto& query = storage.query[buffer];
  constexpr int kLatentTiles = kQkTiles - 1;
  const int box_tiles = query_box_tiles(a.rows);
  const int head = kv_head * a.heads_per_kv;
  const int token = request * a.params.s_q;
  sm90::barrier_arrive_expect(full, a.rows * kHeadDimQk * 2);
  for (int tile = 0; tile < kLatentTiles; tile += box_tiles) {
    sm90::tma_load_4d(sm90::shared_address(query[tile]), a.query_latent_map, full, 0, head, token,
                      tile);
  }
  sm90::tma_load_4d(sm90::shared_address(query[kLatentTiles]), a.query_rope_map, full, 0, head,
                    token, 0);
}

// Every item's query, even if it has no pages, and what the item is. The first lane does it all.
template <int kRows>
__device__ __forceinline__ void load_queries(Storage<kRows>& storage, const Arguments& a,
                                             int kv_head, const PartRange& part) {
  auto& barriers = storage.small.barriers;
  if (threadIdx.x % 32 != 0) return;
  uint32_t count = 0;
  for (int request = part.begin_request; decode::in_part(part, a.params.batch, request);
       ++request, ++count) {
    const uint32_t buffer = count % 2;
    sm90::barrier_wait(barriers.query_empty[buffer], count / 2 % 2 ^ 1);
    request_query(storage, a, kv_head, request, buffer);
    storage.small.assignments[buffer] = {decode::read_item(a, part, request),
                                         decode::find_destination(a, part, request)};
    sm90::barrier_arrive(barriers.query_full[buffer]);
  }
}

// Rows of the query tiles that no query fills, at most seven: zero, once.
template <int kRows>
__device__ __forceinline__ void clear_padding(Storage<kRows>& storage, int rows, int warp) {
  if (rows == kRows) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int tile = warp; tile < 2 * kQkTiles; tile += kThreads / 32) {
    for (int row = rows + lane / 8; row < kRows; row += 4) {
      uint4* const chunks = reinterpret_cast<uint4*>(storage.query[0][tile]) + row * 8;
      chunks[lane % 8] = make_uint4(0, 0, 0, 0);
    }
  }
  sm90::async_proxy_fence();
}

}  // namespace flashmla::decode_few
