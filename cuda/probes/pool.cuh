// A small KV pool on the device, and the kernel arguments that describe it.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "../decode/kernel.cuh"
#include "../runner/problem.h"

namespace flashmla::probes {

using decode::Arguments;
using decode::Storage;
using runner::DeviceArray;

template <class T>
inline constexpr ElementType kElementType =
    std::is_same_v<T, __half> ? ElementType::kFloat16 : ElementType::kBfloat16;

// 16-bit elements as their bits.
class Pool {
 public:
  template <class Value>
  Pool(ElementType type, int num_pages, int h_kv, Value value)
      : type_(type), num_pages_(num_pages), h_kv_(h_kv), host_(size(num_pages, h_kv)) {
    for (size_t i = 0; i < host_.size(); ++i) host_[i] = value(i);
    device_ = std::make_unique<DeviceArray<uint16_t>>(host_);
  }

  size_t index(int page, int token, int kv_head, int column) const {
    const size_t row = (static_cast<size_t>(page) * kPageSize + token) * h_kv_ + kv_head;
    return row * kHeadDimQk + column;
  }
  uint16_t bits(int page, int token, int kv_head, int column) const {
    return host_[index(page, token, kv_head, column)];
  }
  float value(int page, int token, int kv_head, int column) const {
    return runner::to_float(bits(page, token, kv_head, column), type_ == ElementType::kFloat16);
  }

  // Arguments with both tensor maps and the pool's sizes; the rest is zero.
  Arguments arguments() const;

 private:
  static size_t size(int num_pages, int h_kv) {
    return static_cast<size_t>(num_pages) * kPageSize * h_kv * kHeadDimQk;
  }

  ElementType type_;
  int num_pages_;
  int h_kv_;
  std::vector<uint16_t> host_;
  std::unique_ptr<DeviceArray<uint16_t>> device_;
};

// Small whole numbers are exact in both types and in every sum of the probes.
inline uint16_t whole_number(int value, ElementType type) {
  return runner::from_float(static_cast<float>(value), type == ElementType::kFloat16);
}

// One block with the decode kernel's shared memory.
template <class... Parameters, class... Given>
void launch_block(void (*kernel)(Parameters...), int threads, Given... given) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Storage));
  kernel<<<1, threads, sizeof(Storage)>>>(given...);
}

// The block's shared memory with initialised barriers; ends with __syncthreads.
__device__ __forceinline__ Storage& prepare_storage() {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Storage& storage = *reinterpret_cast<Storage*>(shared_bytes);
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared_bytes);
  for (size_t i = threadIdx.x; i < sizeof(Storage) / 4; i += blockDim.x) words[i] = 0xFFFFFFFFu;
  __syncthreads();
  if (threadIdx.x == 0) decode::init_barriers(storage.barriers);
  sm90::async_proxy_fence();
  __syncthreads();
  return storage;
}

// Fetches a page into slot 0; returns in every thread when all of it is there.
__device__ __forceinline__ void fetch_page(Storage& storage, const Arguments& a, int kv_head,
                                           int page_id) {
  if (threadIdx.x == 0) {
    decode::request_page(storage, a, {}, kv_head, page_id, sm90::evict_first_policy());
  }
  for (sm90::Barrier& full : storage.barriers.page_full[0]) sm90::barrier_wait(full, 0);
}

}  // namespace flashmla::probes
