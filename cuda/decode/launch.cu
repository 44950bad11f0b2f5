// Host side of the decode step: arguments, tensor maps, launches.
#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "../combine/kernel.cuh"
#include "../decode_few/launch.h"
#include "../launch.h"
#include "../launch_config.h"
#include "../schedule/kernel.h"
#include "kernel.cuh"
#include "tensor_map.h"

namespace flashmla {
namespace {

using decode::Arguments;

// Packed query rows as {64 columns, R rows, `columns` / 64 tiles, batch}; one box is a query tile.
bool encode_query(CUtensorMap& map, const DecodeParams& p, const void* query, int stride,
                  int columns) {
  const cuuint64_t rows = static_cast<cuuint64_t>(p.s_q) * p.h_q;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride) * 2;
  const cuuint32_t tiles = static_cast<cuuint32_t>(columns) / 64;
  const cuuint64_t sizes[] = {64, rows, tiles, static_cast<cuuint64_t>(p.batch)};
  const cuuint64_t strides[] = {row_bytes, sm90::kTileRowBytes, row_bytes * rows};
  const cuuint32_t box[] = {64, decode::kRowTile, tiles, 1};
  return decode::encode(map, p.element_type, query, sizes, strides, box);
}

Arguments make_arguments(const DecodeParams& params) {
  Arguments a = {};
  a.params = params;
  const int heads_per_kv = params.h_q / params.h_kv;
  decode::set_rows(a, params.s_q * heads_per_kv, heads_per_kv);
  a.row_tiles = schedule::ceil_div(a.rows, decode::kRowTile);
  const long long table_keys = static_cast<long long>(params.max_pages_per_seq) * kPageSize;
  a.max_length = static_cast<int>(std::min<long long>(table_keys, schedule::kMaxInt - kPageSize));
  if (params.num_pages == 0) a.max_length = 0;
  a.scale_log2 = params.softmax_scale * static_cast<float>(M_LOG2E);
  a.few = a.rows <= decode_few::kMostRows;
  return a;
}

const char* encode_maps(Arguments& a) {
  const DecodeParams& p = a.params;
  if (p.num_pages > 0 && !(decode::encode_pool(a.latent_map, p, decode::kBoxTiles) &&
                           decode::encode_pool(a.rope_map, p, 1))) {
    return "kv_cache cannot be described to the TMA unit (16-byte aligned address?)";
  }
  if (p.h_kv == 1 &&
      !(encode_query(a.q_latent_map, p, p.q_latent, p.q_latent_stride, kKvLoraRank) &&
        encode_query(a.q_rope_map, p, p.q_rope, p.q_rope_stride, kRopeDim))) {
    return "the query cannot be described to the TMA unit (16-byte aligned addresses and rows?)";
  }
  return nullptr;
}

template <class T, bool kSerial>
const char* prepare_kernel() {
  return message(cudaFuncSetAttribute(decode::decode_kernel<T, kSerial>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      sizeof(decode::Storage)));
}

template <class T, int kMostRows>
const char* prepare_combine() {
  return message(cudaFuncSetAttribute(combine::combine_kernel<T, kMostRows>,
                                      cudaFuncAttributePreferredSharedMemoryCarveout,
                                      combine::Blocks<kMostRows>::kSharedPercent));
}

template <class T>
const char* prepare_type() {
  if (const char* error = prepare_kernel<T, false>()) return error;
  if (const char* error = prepare_kernel<T, true>()) return error;
  if (const char* error = prepare_combine<T, combine::kFewRowsPerBlock>()) return error;
  if (const char* error = prepare_combine<T, decode_few::kMostRows>()) return error;
  return prepare_combine<T, decode::kRowTile>();
}

// The kernel for row tiles of 64. Odd numbers of tiles from three on lose as pairs.
template <class T>
const char* launch_tiles(const Arguments& a, cudaStream_t stream) {
  const DecodeParams& p = a.params;
  const long long blocks = static_cast<long long>(p.h_kv) * a.row_tiles * p.num_sm_parts;
  const bool pairs = a.row_tiles == 1 || a.row_tiles % 2 == 0;
  const LaunchConfig config(static_cast<unsigned>(blocks), decode::kThreads,
                            sizeof(decode::Storage), stream, p.early_start,
                            /*cluster=*/pairs ? 2 : 1);
  return config.launch(p.serial ? decode::decode_kernel<T, true> : decode::decode_kernel<T, false>,
                       a);
}

template <class T, int kMostRows>
const char* launch_combine(const Arguments& a, cudaStream_t stream) {
  using Blocks = combine::Blocks<kMostRows>;
  const DecodeParams& p = a.params;
  const int tiles = p.h_kv * a.row_tiles;
  const long long blocks = static_cast<long long>(Blocks::per_tile(tiles)) * tiles;
  const LaunchConfig config(static_cast<unsigned>(blocks * p.num_sm_parts), Blocks::kThreads, 0,
                            stream, /*early=*/true, /*cluster=*/Blocks::kFew ? 2 : 1);
  return config.launch(combine::combine_kernel<T, kMostRows>, a, static_cast<int>(blocks));
}

template <class T>
const char* launch_type(const Arguments& a, cudaStream_t stream) {
  const DecodeParams& p = a.params;
  const char* const error = a.few ? decode_few::launch(a, stream) : launch_tiles<T>(a, stream);
  if (error != nullptr) return error;
  if (p.num_sm_parts == 1) return nullptr;  // nothing can be split
  if (a.rows <= combine::kFewRowsPerBlock) {
    return launch_combine<T, combine::kFewRowsPerBlock>(a, stream);
  }
  if (a.few) return launch_combine<T, decode_few::kMostRows>(a, stream);
  return launch_combine<T, decode::kRowTile>(a, stream);
}

}  // namespace

const char* prepare_device() {
  int device = 0;
  int major = 0;
  int minor = 0;
  if (const char* error = message(cudaGetDevice(&device))) return error;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return "the device is not sm_90 (Hopper): no kernel for it";
  if (!decode::has_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled";
  if (const char* error = schedule::prepare()) return error;
  if (const char* error = decode_few::prepare()) return error;
  if (const char* error = prepare_type<__nv_bfloat16>()) return error;
  return prepare_type<__half>();
}

const char* launch_decode(const DecodeParams& params, cudaStream_t stream) {
  Arguments a = make_arguments(params);
  const long long blocks = static_cast<long long>(params.h_kv) * a.row_tiles * params.num_sm_parts;
  if (blocks > schedule::kMaxInt / combine::Blocks<decode::kRowTile>::kMostPerTile)
    return "too many query rows times SM parts for one grid";
  if (!decode::has_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled";
  if (const char* error = a.few ? nullptr : encode_maps(a)) return error;
  return params.element_type == ElementType::kBfloat16 ? launch_type<__nv_bfloat16>(a, stream)
                                                       : launch_type<__half>(a, stream);
}

}  // namespace flashmla
