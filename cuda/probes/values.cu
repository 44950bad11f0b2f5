// O = P V of one page: V is the page's latent columns read as the transposed operand; P comes from
// registers, or from shared memory as the other half leaves it there.
#include <cstring>

#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

constexpr int kPage = 1;

template <class T>
__device__ __forceinline__ void fill_fragment(const float* weights, decode::Weights& fragment) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float* const pair =
        weights + decode::fragment_row(i % 2) * kPageSize + decode::fragment_column(i / 2);
    fragment[i / 4][i % 4] = pack_pair<T>(pair[0], pair[1]);
  }
}

// The fragment into a swizzled tile.
__device__ __forceinline__ void store_fragment(uint8_t (&tile)[sm90::kTileBytes],
                                               const decode::Weights& fragment) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t row = threadIdx.x / 32 % decode::kWarpsPerWarpgroup * 16 + lane % 16;
#pragma unroll
  for (uint32_t step = 0; step < 4; ++step) {
    sm90::store_matrix_x4(
        sm90::shared_address(tile) + sm90::swizzled_chunk(row, step * 2 + lane / 16),
        fragment[step]);
  }
}

// Two warpgroups, each with its half of V. result [64, 512].
template <class T, bool kFromShared>
__global__ void __launch_bounds__(2 * decode::kWarpgroup)
    values_kernel(const __grid_constant__ Arguments a, const float* weights, float* result) {
  Storage& storage = prepare_storage();
  const int half = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / decode::kWarpgroup, 0);
  fetch_page(storage, a, 0, kPage);
  __syncthreads();
  decode::Weights fragment;
  fill_fragment<T>(weights, fragment);
  uint8_t (&tile)[sm90::kTileBytes] = storage.pages[0][decode::part_tiles(decode::kRope).begin];
  if (kFromShared && half == decode::kLeftHalf) store_fragment(tile, fragment);
  sm90::async_proxy_fence();
  __syncthreads();

  float out[128] = {};
  const uint64_t values = sm90::mn_major_descriptor(
      sm90::shared_address(storage.pages[0][decode::part_tiles(half).begin]));
  sm90::pin_registers(out);
  sm90::wgmma_fence();
  if constexpr (kFromShared) {
    const uint64_t shared_weights = sm90::k_major_descriptor(sm90::shared_address(tile));
    decode::add_values<T, false>(out, shared_weights, values);
  } else {
    decode::add_values<T, false>(out, fragment, values);
  }
  sm90::wgmma_commit();
  sm90::wgmma_wait<0>();
  sm90::pin_registers(out);
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    const int row = decode::fragment_row(i / 2 % 2);
    const int column = half * kHeadDimV / 2 + decode::fragment_column(i / 4) + i % 2;
    result[row * kHeadDimV + column] = out[i];
  }
}

template <class T, bool kFromShared>
std::vector<float> multiply(Mismatches& mismatches, const Pool& pool,
                            const std::vector<float>& weights) {
  const DeviceArray<float> device_weights(weights);
  DeviceArray<float> result(decode::kRowTile * kHeadDimV);
  result.poison();
  launch_block(values_kernel<T, kFromShared>, 2 * decode::kWarpgroup, pool.arguments(),
               static_cast<const float*>(device_weights.get()), result.get());
  mismatches.synchronize("values_kernel");
  return result.host();
}

int small(size_t i) { return static_cast<int>(i * 2654435761u >> 9) % 7 - 3; }

// Whole numbers: every product and sum is exact.
template <class T, bool kFromShared>
void compare(Mismatches& mismatches) {
  const Pool pool(kElementType<T>, 2, 1,
                  [](size_t i) { return whole_number(small(i), kElementType<T>); });
  std::vector<float> weights(decode::kRowTile * kPageSize);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(small(i + 12345));
  const std::vector<float> got = multiply<T, kFromShared>(mismatches, pool, weights);
  for (int row = 0; row < decode::kRowTile; ++row) {
    for (int column = 0; column < kHeadDimV; ++column) {
      double expected = 0;
      for (int key = 0; key < kPageSize; ++key) {
        expected += weights[row * kPageSize + key] * pool.value(kPage, key, 0, column);
      }
      mismatches.expect(got[row * kHeadDimV + column], expected, 0,
                        kFromShared ? "P in memory" : "P in registers", row, column);
    }
  }
}

template <class T>
void same_bits(Mismatches& mismatches) {
  const auto fraction = [](size_t i) {
    return static_cast<float>(i * 2654435761u % 65536) / 65536.f;
  };
  const Pool pool(kElementType<T>, 2, 1, [&](size_t i) {
    return runner::from_float(fraction(i) - 0.5f, kElementType<T> == ElementType::kFloat16);
  });
  std::vector<float> weights(decode::kRowTile * kPageSize);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = fraction(i + 777);
  const std::vector<float> registers = multiply<T, false>(mismatches, pool, weights);
  const std::vector<float> memory = multiply<T, true>(mismatches, pool, weights);
  for (int i = 0; i < static_cast<int>(registers.size()); ++i) {
    mismatches.expect(memory[i], registers[i], 0, "memory against registers", i / kHeadDimV,
                      i % kHeadDimV);
  }
}

}  // namespace

bool probe_values() {
  Mismatches mismatches;
  compare<__nv_bfloat16, false>(mismatches);
  compare<__nv_bfloat16, true>(mismatches);
  compare<__half, false>(mismatches);
  compare<__half, true>(mismatches);
  return mismatches.none();
}

bool probe_weights() {
  Mismatches mismatches;
  same_bits<__nv_bfloat16>(mismatches);
  same_bits<__half>(mismatches);
  return mismatches.none();
}

}  // namespace flashmla::probes
