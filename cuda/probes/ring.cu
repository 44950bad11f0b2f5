// The page ring: the producer's code against a consumer that sums up each part of each page.
#include <algorithm>

#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

constexpr int kHeadsKv = 2;
constexpr int kHead = 1;

// Warp 0 streams the part's pages; warps 4-7 add the boxes' sums into sums [pages, kPageBoxes].
__global__ void __launch_bounds__(2 * decode::kWarpgroup)
    ring_kernel(const __grid_constant__ Arguments a, int pages, unsigned* sums) {
  Storage& storage = prepare_storage();
  if (threadIdx.x == 0) storage.part = decode::read_part(a, 0);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp == 0) decode::stream_pages(storage, a, {0, kHead, 0});
  if (warp < decode::kWarpsPerWarpgroup) return;
  const int thread = static_cast<int>(threadIdx.x) % decode::kWarpgroup;
  for (decode::PagePosition position; position.count < static_cast<uint32_t>(pages);
       ++position.count) {
    __nanosleep((warp * 37 + position.count * 101) % 300);
    for (int box = 0; box < decode::kPageBoxes; ++box) {
      const decode::TileRange tiles = decode::box_tiles(box);
      const uint32_t slot = position.slot();
      sm90::barrier_wait(storage.barriers.page_full[slot][box], position.parity());
      const uint16_t* const elements =
          reinterpret_cast<uint16_t*>(storage.pages[slot][tiles.begin]);
      unsigned sum = 0;
      for (uint32_t i = thread; i < decode::bytes_of(tiles) / 2; i += decode::kWarpgroup) {
        sum += elements[i];
      }
      atomicAdd(&sums[position.count * decode::kPageBoxes + box], sum);
      __syncwarp();
      if (threadIdx.x % 32 == 0 && decode::ends_part(box)) {
        sm90::barrier_arrive(storage.barriers.page_empty[slot][decode::part_of(box)]);
      }
    }
  }
}

unsigned box_sum(const Pool& pool, int page, int box) {
  const decode::TileRange tiles = decode::box_tiles(box);
  unsigned sum = 0;
  for (int token = 0; token < kPageSize; ++token) {
    for (int c = tiles.begin * 64; c < (tiles.begin + tiles.count) * 64; ++c) {
      sum += pool.bits(page, token, kHead, c);
    }
  }
  return sum;
}

}  // namespace

bool probe_ring() {
  constexpr int kPoolPages = 16;
  constexpr int kBeginPage = 1;
  constexpr int kEndPage = 5;
  const std::vector<int> page_counts = {3, 0, 1, 32, 33, 64, 65, 2, 150, 1, 0, 9};
  const int batch = static_cast<int>(page_counts.size());
  const int width = *std::max_element(page_counts.begin(), page_counts.end());
  const Pool pool(ElementType::kBfloat16, kPoolPages, kHeadsKv,
                  [](size_t i) { return static_cast<uint16_t>(i * 40503 >> 4); });
  std::vector<int> table, lengths, walk;
  for (int r = 0; r < batch; ++r) {
    for (int p = 0; p < width; ++p) table.push_back((r * 5 + p * 7) % kPoolPages);
    lengths.push_back(page_counts[r] * kPageSize);
    const int end = r == batch - 1 ? kEndPage : page_counts[r];
    for (int p = r == 0 ? kBeginPage : 0; p < end; ++p) walk.push_back(table[r * width + p]);
  }
  const DeviceArray<int> device_table(table), device_lengths(lengths);
  const DeviceArray<int> part({0, kBeginPage, batch - 1, kEndPage, 0, 0, 0, 0});
  const int pages = static_cast<int>(walk.size());
  DeviceArray<unsigned> sums(std::vector<unsigned>(walk.size() * decode::kPageBoxes));
  Arguments a = pool.arguments();
  a.params.block_table = device_table.get();
  a.params.cache_seqlens = device_lengths.get();
  a.params.tile_scheduler_metadata = part.get();
  a.params.batch = batch;
  a.params.max_pages_per_seq = width;
  a.max_length = width * kPageSize;
  Mismatches mismatches;
  launch_block(ring_kernel, 2 * decode::kWarpgroup, a, pages, sums.get());
  mismatches.synchronize("ring_kernel");
  const std::vector<unsigned> got = sums.host();
  for (int n = 0; n < pages; ++n) {
    for (int box = 0; box < decode::kPageBoxes; ++box) {
      mismatches.expect(got[n * decode::kPageBoxes + box], box_sum(pool, walk[n], box), 0,
                        "sum of [page][box]", n, box);
    }
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
