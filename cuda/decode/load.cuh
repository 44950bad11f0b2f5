// The producer warpgroup: warp 0 streams pages by TMA, warps 1-3 copy query tiles.
#pragma once

#include "../sm90/copy.cuh"
#include "arguments.h"
#include "storage.h"

namespace flashmla::decode {

// Counts what passed through a ring of kSlots: the slot to use, and the parity of its phase.
template <int kSlots>
struct RingPosition {
  uint32_t count = 0;
  __device__ __forceinline__ uint32_t slot() const { return count % kSlots; }
  __device__ __forceinline__ uint32_t parity() const { return count / kSlots % 2; }
};
using PagePosition = RingPosition<kPageSlots>;

// Page ids 32 at a time, one per lane: the latency of a table read is paid once per 32 pages. The
// first are asked for before the request's length is known, so that the two latencies overlap.
class PageIds {
 public:
  __device__ PageIds(const Arguments& a, int request, int begin_page)
      : table_row_(a.params.block_table +
                   static_cast<long long>(request) * a.params.max_pages_per_seq),
        width_(a.params.max_pages_per_seq),
        begin_(begin_page) {
    read(begin_page);
  }

  // Called by the whole warp for begin_page, begin_page + 1, …
  __device__ __forceinline__ int get(int page) {
    const int index = (page - begin_) % 32;
    if (index == 0 && page != begin_) read(page);
    return __shfl_sync(~0u, held_, index);
  }

 private:
  __device__ __forceinline__ void read(int page) {
    const int mine = page + static_cast<int>(threadIdx.x % 32);
    held_ = mine < width_ ? table_row_[mine] : 0;
  }

  const int* table_row_;
  int width_;
  int begin_;
  int held_;
};

// Brings the block table to L2, each block its lines, while the blocks wait for the schedule.
__device__ __forceinline__ void prefetch_table(const Arguments& a, int block, int blocks) {
  constexpr long long kLine = 128;
  const long long bytes =
      static_cast<long long>(sizeof(int)) * a.params.batch * a.params.max_pages_per_seq;
  const long long offset = (block + static_cast<long long>(threadIdx.x % 32) * blocks) * kLine;
  if (offset < bytes) {
    sm90::prefetch_to_l2(reinterpret_cast<const char*>(a.params.block_table) + offset);
  }
}

// One page, box by box, in the order in which the scores use them. An id outside the pool gives
// zeros.
__device__ __forceinline__ void request_page(Storage& storage, const Arguments& a,
                                             PagePosition position, int kv_head, int page_id,
                                             uint64_t policy) {
  const uint32_t slot = position.slot();
  Barriers& barriers = storage.barriers;
#pragma unroll
  for (int box = 0; box < kPageBoxes; ++box) {
    const TileRange tiles = box_tiles(box);
    const int part = part_of(box);
    if (tiles.begin == part_tiles(part).begin) {
      sm90::barrier_wait(barriers.page_empty[slot][part], position.parity() ^ 1);
    }
    sm90::Barrier& full = barriers.page_full[slot][box];
    sm90::barrier_arrive_expect(full, bytes_of(tiles));
    sm90::tma_load_4d(sm90::shared_address(storage.pages[slot][tiles.begin]),
                      part == kRope ? a.rope_map : a.latent_map, full, 0, 0,
                      kv_head * kQkTiles + tiles.begin, page_id, policy);
  }
}

__device__ __forceinline__ void stream_pages(Storage& storage, const Arguments& a,
                                             const BlockPlace& place) {
  const bool elected = threadIdx.x % 32 == 0;
  const PartRange& part = storage.part;
  const uint64_t policy = sm90::evict_first_policy();
  PagePosition position;
  for (int request = part.begin_request; in_part(part, a.params.batch, request); ++request) {
    const int begin_page = request == part.begin_request ? part.begin_page : 0;
    PageIds ids(a, request, clamped(begin_page, 0, a.params.max_pages_per_seq));
    const WorkItem item = read_item(a, part, request);
    for (int page = item.begin_page; page < item.end_page; ++page, ++position.count) {
      const int page_id = ids.get(page);
      sm90::random_delay(a.params.delay_seed);
      if (elected) request_page(storage, a, position, place.kv_head, page_id, policy);
      __syncwarp();
    }
  }
}

// 64 rows of 16-byte chunks into swizzled tiles; rows beyond the last are zero.
template <int kColumns>
__device__ __forceinline__ void copy_query_columns(uint8_t (*tiles)[sm90::kTileBytes],
                                                   const uint16_t* source, int stride,
                                                   const Arguments& a, const BlockPlace& place,
                                                   int request, int loader) {
  constexpr int kChunks = kColumns / 8;  // 16-byte chunks of a row
  constexpr int kLanesPerRow = kChunks < 32 ? kChunks : 32;
  constexpr int kRowsPerPass = 32 / kLanesPerRow;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int base = loader * kRowsPerPass; base < kRowTile;
       base += kQueryLoaderWarps * kRowsPerPass) {
    const int tile_row = base + lane / kLanesPerRow;
    if (tile_row >= kRowTile) break;
    const int row = place.first_row + tile_row;
    const bool valid = row < a.rows;
    const long long vector = query_vector(a, request, place.kv_head, valid ? row : 0);
    const uint16_t* const row_source = source + vector * stride;
#pragma unroll
    for (int chunk = lane % kLanesPerRow; chunk < kChunks; chunk += kLanesPerRow) {
      sm90::copy_chunk_async(
          sm90::shared_address(tiles[chunk / 8]) + sm90::swizzled_chunk(tile_row, chunk % 8),
          row_source + chunk * 8, valid);
    }
  }
}

// The query tile of a request in two TMA requests; where it counts them, `full` expects the bytes.
__device__ __forceinline__ void request_query(Storage& storage, const Arguments& a,
                                              const BlockPlace& place, int request) {
  sm90::Barrier& full = storage.barriers.query_full;
  sm90::barrier_expect(full, sizeof(storage.query));
  sm90::tma_load_4d(sm90::shared_address(storage.query[0]), a.q_latent_map, full, 0,
                    place.first_row, 0, request);
  sm90::tma_load_4d(sm90::shared_address(storage.query[kQkTiles - 1]), a.q_rope_map, full, 0,
                    place.first_row, 0, request);
}

// Brings a later request's query tile to L2.
__device__ __forceinline__ void prefetch_query(const Arguments& a, const BlockPlace& place,
                                               int request) {
  sm90::tma_prefetch_4d(a.q_latent_map, 0, place.first_row, 0, request);
  sm90::tma_prefetch_4d(a.q_rope_map, 0, place.first_row, 0, request);
}

__device__ __forceinline__ void copy_query(Storage& storage, const Arguments& a,
                                           const BlockPlace& place, int request, int loader) {
  copy_query_columns<kKvLoraRank>(storage.query, static_cast<const uint16_t*>(a.params.q_latent),
                                  a.params.q_latent_stride, a, place, request, loader);
  copy_query_columns<kRopeDim>(storage.query + kQkTiles - 1,
                               static_cast<const uint16_t*>(a.params.q_rope),
                               a.params.q_rope_stride, a, place, request, loader);
  sm90::copy_chunks_wait();
  sm90::async_proxy_fence();
}

// Also tells the halves what the item is; reading that takes as long as the query tile.
__device__ __forceinline__ void load_queries(Storage& storage, const Arguments& a,
                                             const BlockPlace& place, int loader) {
  const PartRange& part = storage.part;
  const bool by_tma = a.params.h_kv == 1;
  const bool speaks = loader == 0 && threadIdx.x % 32 == 0;
  uint32_t parity = 0;
  for (int request = part.begin_request; in_part(part, a.params.batch, request); ++request) {
    sm90::barrier_wait(storage.barriers.query_empty, parity ^ 1);
    sm90::random_delay(a.params.delay_seed);
    if (by_tma) {
      if (speaks) {
        request_query(storage, a, place, request);
        if (in_part(part, a.params.batch, request + 1)) prefetch_query(a, place, request + 1);
      }
    } else {
      copy_query(storage, a, place, request, loader);
    }
    if (speaks) {
      storage.assignments[parity] = {read_item(a, part, request),
                                     find_destination(a, part, request)};
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) sm90::barrier_arrive(storage.barriers.query_full);
    parity ^= 1;
  }
}

}  // namespace flashmla::decode
