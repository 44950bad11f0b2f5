// Copies the pages of each request to contiguous memory, zeros where the request has no token.
//
// A block copies a unit: 16 tokens' worth of one page of the result, 18 KB. The units' order is
// that of the result, so the grid depends on shapes only.
#include "../message.h"
#include "../vector.cuh"
#include "launch.h"

namespace flashmla::cache {
namespace {

constexpr int kRowVectors = kHeadDimQk / kVectorColumns;  // of a token and KV head
constexpr int kThreads = 288;
constexpr int kVectorsPerThread = 4;  // requested together; 8 warps of 9 fill an SM with 128 KB
constexpr int kUnitVectors = kThreads * kVectorsPerThread;
constexpr int kUnitsPerPage = kPageSize * kRowVectors / kUnitVectors;  // times h_kv
static_assert(kUnitsPerPage * kUnitVectors == kPageSize * kRowVectors, "whole units in a page");

__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p) {
  const int unit = static_cast<int>(blockIdx.x);
  const int units_per_page = kUnitsPerPage * p.h_kv;
  const int entry = unit / units_per_page;  // of [batch, max_pages_per_seq]
  const int page_of_request = entry % p.max_pages_per_seq;
  const int length = max(p.cache_seqlens[entry / p.max_pages_per_seq], 0);
  const int page = p.block_table[entry];
  const bool inside = 0 <= page && page < p.num_pages;
  const int tokens = inside ? min(length - page_of_request * kPageSize, kPageSize) : 0;

  const int first = unit % units_per_page * kUnitVectors + static_cast<int>(threadIdx.x);
  const int end = tokens * kRowVectors * p.h_kv;  // vectors of the page that hold tokens
  const long long page_vectors = static_cast<long long>(kPageSize) * kRowVectors * p.h_kv;
  const uint4* const source = static_cast<const uint4*>(p.cache) + page * page_vectors;
  uint4* const target = static_cast<uint4*>(p.tokens) + entry * page_vectors;
  uint4 read[kVectorsPerThread];
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int vector = first + i * kThreads;
    read[i] = vector < end ? source[vector] : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) target[first + i * kThreads] = read[i];
}

}  // namespace

const char* prepare_gather() {
  cudaFuncAttributes attributes;
  return message(cudaFuncGetAttributes(&attributes, gather_kernel));
}

const char* launch_gather(const GatherParams& params, cudaStream_t stream) {
  const long long entries = static_cast<long long>(params.batch) * params.max_pages_per_seq;
  const long long units = entries * params.h_kv * kUnitsPerPage;
  if (units > 0x7fffffff) return "too many pages times KV heads for one grid";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(units));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return message(cudaLaunchKernelEx(&config, gather_kernel, params));
}

}  // namespace flashmla::cache
