#include <cuda_runtime_api.h>

#include "config.h"
#include "tensor_map.h"

namespace flashmla::decode {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, without linking against libcuda. nullptr if the driver lacks it.
EncodeTiled find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

EncodeTiled encoder() {
  static const EncodeTiled function = find_encoder();
  return function;
}

}  // namespace

bool has_tensor_maps() { return encoder() != nullptr; }

bool encode(CUtensorMap& map, ElementType type, const void* base, const cuuint64_t (&sizes)[4],
            const cuuint64_t (&strides)[3], const cuuint32_t (&box)[4]) {
  const cuuint32_t element_strides[] = {1, 1, 1, 1};
  const auto data_type = type == ElementType::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encoder()(&map, data_type, 4, const_cast<void*>(base), sizes, strides, box,
                   element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_NONE,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool encode_pool(CUtensorMap& map, const DecodeParams& p, int tiles) {
  const cuuint64_t token_bytes = static_cast<cuuint64_t>(p.h_kv) * kHeadDimQk * 2;
  const cuuint64_t sizes[] = {64, kPageSize, static_cast<cuuint64_t>(p.h_kv) * kQkTiles,
                              static_cast<cuuint64_t>(p.num_pages)};
  const cuuint64_t strides[] = {token_bytes, sm90::kTileRowBytes, token_bytes * kPageSize};
  const cuuint32_t box[] = {64, kPageSize, static_cast<cuuint32_t>(tiles), 1};
  return encode(map, p.element_type, p.kv_cache, sizes, strides, box);
}

}  // namespace flashmla::decode
