// Host side: the kernel for a number of rows, an element type, and the serial test variant.
#include "../decode/tensor_map.h"
#include "../launch_config.h"
#include "kernel.cuh"
#include "launch.h"

namespace flashmla::decode_few {
namespace {

struct Kernel {
  void (*function)(Arguments);
  size_t shared_bytes;
};

template <class T, int kRows>
Kernel pick(bool serial) {
  return {serial ? decode_few_kernel<T, kRows, true> : decode_few_kernel<T, kRows, false>,
          sizeof(Storage<kRows>)};
}

template <class T>
Kernel pick(int rows, bool serial) {
  switch (padded_rows(rows)) {
    case 8:
      return pick<T, 8>(serial);
    case 16:
      return pick<T, 16>(serial);
    case 24:
      return pick<T, 24>(serial);
    default:
      static_assert(kMostRows == 32);
      return pick<T, 32>(serial);
  }
}

Kernel pick(ElementType type, int rows, bool serial) {
  return type == ElementType::kBfloat16 ? pick<__nv_bfloat16>(rows, serial)
                                        : pick<__half>(rows, serial);
}

// Queries [batch, s_q, h_q, 64 * tiles], rows `stride` elements apart, as tiles of 64 columns. A
// box is what a block of the grid needs, `box_tiles` tiles at once.
bool encode_query(CUtensorMap& map, const Arguments& a, const void* query, int stride, int tiles,
                  int box_tiles) {
  const DecodeParams& p = a.params;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride) * 2;
  const cuuint64_t tokens = static_cast<cuuint64_t>(p.batch) * p.s_q;
  const cuuint64_t sizes[] = {64, static_cast<cuuint64_t>(p.h_q), tokens,
                              static_cast<cuuint64_t>(tiles)};
  const cuuint64_t strides[] = {row_bytes, row_bytes * p.h_q, sm90::kTileRowBytes};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(a.heads_per_kv),
                            static_cast<cuuint32_t>(p.s_q), static_cast<cuuint32_t>(box_tiles)};
  return decode::encode(map, p.element_type, query, sizes, strides, box);
}

const char* encode_maps(Arguments& a) {
  const DecodeParams& p = a.params;
  if (p.num_pages > 0 && !decode::encode_pool(a.page_map, p, kPartTiles)) {
    return "kv_cache cannot be described to the TMA unit (16-byte aligned address?)";
  }
  if (!(encode_query(a.query_latent_map, a, p.q_latent, p.q_latent_stride, kQkTiles - 1,
                     query_box_tiles(a.rows)) &&
        encode_query(a.query_rope_map, a, p.q_rope, p.q_rope_stride, 1, 1))) {
    return "the query cannot be described to the TMA unit (16-byte aligned addresses and rows?)";
  }
  return nullptr;
}

}  // namespace

const char* prepare() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    for (int rows = kRowStep; rows <= kMostRows; rows += kRowStep) {
      for (const bool serial : {false, true}) {
        const Kernel kernel = pick(type, rows, serial);
        const cudaError_t error =
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kernel.shared_bytes));
        if (error != cudaSuccess) return message(error);
      }
    }
  }
  return nullptr;
}

const char* launch(const decode::Arguments& common, cudaStream_t stream) {
  Arguments a = {};
  static_cast<decode::Arguments&>(a) = common;
  if (const char* error = encode_maps(a)) return error;
  const Kernel kernel = pick(a.params.element_type, a.rows, a.params.serial);
  const LaunchConfig config(
      dim3(static_cast<unsigned>(a.params.num_sm_parts), static_cast<unsigned>(a.params.h_kv)),
      kThreads, kernel.shared_bytes, stream, a.params.early_start, /*cluster=*/2);
  return config.launch(kernel.function, a);
}

}  // namespace flashmla::decode_few
