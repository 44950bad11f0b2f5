// What a block does beside its own preparations and, if it may begin so early, before the kernel
// ahead on the stream has ended: it brings its first pages to L2.
//
// The kernel ahead may be writing the schedule, lengths and block table: what is read here is good
// for that and nothing else. Pages that it writes are brought all the same: L2 is where it writes.
#pragma once

#include "../sm90/copy.cuh"
#include "arguments.h"

namespace flashmla::decode {

// The first pages of a part, lane l has page l.
struct FirstPages {
  int count = 0;
  int id = 0;          // of this lane's page
  bool split = false;  // they are of a piece of a request

  // The whole warp's first page.
  __device__ __forceinline__ int first_id() const { return __shfl_sync(~0u, id, 0); }

  // None if they are less than `least` of one request: nothing is read for those.
  __device__ __forceinline__ FirstPages(const Arguments& a, int part, int least) {
    int row[kScheduleColumns] = {};
    const int* const source =
        a.params.tile_scheduler_metadata + static_cast<long long>(part) * kScheduleColumns;
#pragma unroll
    for (int column = 0; column < 4; ++column) row[column] = sm90::load_unsettled(source + column);
    const PartRange range = read_part(row, a.params.batch);
    const int request = range.begin_request;
    if (!in_part(range, a.params.batch, request)) return;
    if (range.end_request == request && range.end_page - range.begin_page < least) return;
    const int width = a.params.max_pages_per_seq;
    const int mine = clamped(range.begin_page, 0, width) + static_cast<int>(threadIdx.x % 32);
    if (mine < width) {
      id = sm90::load_unsettled(a.params.block_table + static_cast<long long>(request) * width +
                                mine);
    }
    const int length = sm90::load_unsettled(a.params.cache_seqlens + request);
    const WorkItem item = make_item(range, request, length, a.max_length);
    count = item.end_page - item.begin_page;
    split = item.begin_page > 0 || item.end_page < schedule::ceil_div(item.length, kPageSize);
  }
};

// Without an early start reading two addresses takes as long as the rest of the preparations: not
// worth it for a page or two.
__device__ __forceinline__ int least_to_prefetch(const Arguments& a) {
  return a.params.early_start ? 1 : 3;
}

// Row tiles that read the same pages share the boxes, and bring a page for every two of them. Where
// they do, memory is idle before only if this is an early start, and requests are split and
// combined.
__device__ __forceinline__ void prefetch_first_pages(const Arguments& a, const BlockPlace& place) {
  constexpr int kLanesPerPage = 8;
  static_assert(kPageBoxes <= kLanesPerPage);
  if (a.row_tiles > 1 && !a.params.early_start) return;
  const FirstPages pages(a, place.part, least_to_prefetch(a));
  const int wanted = a.row_tiles == 1 || pages.split ? schedule::ceil_div(a.row_tiles, 2) : 0;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int page = lane / kLanesPerPage;
  const int box = lane % kLanesPerPage;
  const int id = __shfl_sync(~0u, pages.id, page);
  if (box >= kPageBoxes || page >= min(wanted, pages.count)) return;
  if ((box + page) % a.row_tiles != place.first_row / kRowTile) return;
  const TileRange tiles = box_tiles(box);
  sm90::tma_prefetch_4d(part_of(box) == kRope ? a.rope_map : a.latent_map, 0, 0,
                        place.kv_head * kQkTiles + tiles.begin, id, sm90::evict_first_policy());
}

}  // namespace flashmla::decode
