#include "pool.cuh"

namespace flashmla::probes {
namespace {

// The pool as {64 columns, 64 tokens, tiles, pages}; a box takes `tiles` tiles.
CUtensorMap encode(void* data, ElementType type, int num_pages, int h_kv, int tiles) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &found);
  CUtensorMap map = {};
  if (function == nullptr) return map;  // the launch will fail
  const cuuint64_t token_bytes = static_cast<cuuint64_t>(h_kv) * kHeadDimQk * 2;
  const cuuint64_t sizes[] = {64, kPageSize, static_cast<cuuint64_t>(h_kv) * decode::kQkTiles,
                              static_cast<cuuint64_t>(num_pages)};
  const cuuint64_t strides[] = {token_bytes, 128, token_bytes * kPageSize};
  const cuuint32_t box[] = {64, kPageSize, static_cast<cuuint32_t>(tiles), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map,
      type == ElementType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

}  // namespace

Arguments Pool::arguments() const {
  Arguments a = {};
  a.latent_map = encode(device_->get(), type_, num_pages_, h_kv_, decode::kBoxTiles);
  a.rope_map = encode(device_->get(), type_, num_pages_, h_kv_, 1);
  a.params.element_type = type_;
  a.params.kv_cache = device_->get();
  a.params.num_pages = num_pages_;
  a.params.h_kv = h_kv_;
  return a;
}

}  // namespace flashmla::probes
