// S = Q Kᵀ of one page: queries as the loaders lay them, keys as TMA does, in both types.
#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

constexpr int kHeads = 100;  // a full row tile and one of 36 rows
constexpr int kPage = 1;

template <class T>
__global__ void __launch_bounds__(decode::kWarpgroup)
    scores_kernel(const __grid_constant__ Arguments a, int first_row, float* result) {
  Storage& storage = prepare_storage();
  const int warp = static_cast<int>(threadIdx.x / 32);
  const decode::BlockPlace place = {0, 0, first_row};
  if (warp < decode::kQueryLoaderWarps) {
    decode::copy_query_columns<kKvLoraRank>(storage.query,
                                            static_cast<const uint16_t*>(a.params.q_latent),
                                            a.params.q_latent_stride, a, place, 0, warp);
    decode::copy_query_columns<kRopeDim>(storage.query + decode::kQkTiles - 1,
                                         static_cast<const uint16_t*>(a.params.q_rope),
                                         a.params.q_rope_stride, a, place, 0, warp);
    sm90::copy_chunks_wait();
    sm90::async_proxy_fence();
  }
  fetch_page(storage, a, 0, kPage);
  __syncthreads();
  float scores[32];
  sm90::pin_registers(scores);
  sm90::wgmma_fence();
  const uint64_t query = sm90::k_major_descriptor(sm90::shared_address(storage.query));
  const uint64_t page = sm90::k_major_descriptor(sm90::shared_address(storage.pages[0]));
  decode::add_scores<T, false>(scores, query, page, {0, decode::kQkTiles});
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::pin_registers(scores);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = decode::fragment_row(i / 2 % 2);
    result[row * kPageSize + decode::fragment_column(i / 4) + i % 2] = scores[i];
  }
}

// Queries [kHeads, 576] and page kPage of the pool, on the device and by hand.
template <class T, class Query>
void compare(Mismatches& mismatches, const Pool& pool, Query query) {
  std::vector<uint16_t> queries(static_cast<size_t>(kHeads) * kHeadDimQk);
  for (int i = 0; i < kHeads * kHeadDimQk; ++i) {
    queries[i] = whole_number(query(i / kHeadDimQk, i % kHeadDimQk), kElementType<T>);
  }
  const DeviceArray<uint16_t> device_queries(queries);
  DeviceArray<float> result(decode::kRowTile * kPageSize);
  Arguments a = pool.arguments();
  a.params.q_latent = device_queries.get();
  a.params.q_rope = device_queries.get() + kKvLoraRank;
  a.params.q_latent_stride = a.params.q_rope_stride = kHeadDimQk;
  a.params.s_q = 1;
  a.params.h_q = kHeads;
  set_rows(a, kHeads, kHeads);
  for (int first_row = 0; first_row < kHeads; first_row += decode::kRowTile) {
    result.poison();
    launch_block(scores_kernel<T>, decode::kWarpgroup, a, first_row, result.get());
    mismatches.synchronize("scores_kernel");
    const std::vector<float> got = result.host();
    for (int row = 0; row < decode::kRowTile; ++row) {
      const int head = first_row + row;
      for (int key = 0; key < kPageSize; ++key) {
        double expected = 0;
        for (int c = 0; c < kHeadDimQk && head < kHeads; ++c) {
          if (const int q = query(head, c)) expected += q * pool.value(kPage, key, 0, c);
        }
        mismatches.expect(got[row * kPageSize + key], expected, 0, "score", head, key);
      }
    }
  }
}

// Head h of round i sees column h + 100 i alone: six rounds cover all columns.
template <class T>
void one_hot(Mismatches& mismatches) {
  const Pool pool(kElementType<T>, 2, 1, [](size_t i) {
    return whole_number(static_cast<int>((i / kHeadDimQk * 7 + i % kHeadDimQk * 3) % 251),
                        kElementType<T>);
  });
  for (int round = 0; round * kHeads < kHeadDimQk; ++round) {
    compare<T>(mismatches, pool,
               [&](int head, int c) { return c == (head + round * kHeads) % kHeadDimQk ? 1 : 0; });
  }
}

template <class T>
void walk(Mismatches& mismatches) {
  const auto small = [](size_t i) { return static_cast<int>(i * 2654435761u >> 7) % 7 - 3; };
  const Pool pool(kElementType<T>, 2, 1,
                  [&](size_t i) { return whole_number(small(i), kElementType<T>); });
  compare<T>(mismatches, pool, [&](int head, int c) { return small(head * 7919 + c * 31 + 5); });
}

}  // namespace

bool probe_one_hot() {
  Mismatches mismatches;
  one_hot<__nv_bfloat16>(mismatches);
  one_hot<__half>(mismatches);
  return mismatches.none();
}

bool probe_walk() {
  Mismatches mismatches;
  walk<__nv_bfloat16>(mismatches);
  walk<__half>(mismatches);
  return mismatches.none();
}

}  // namespace flashmla::probes
