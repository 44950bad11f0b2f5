// The schedule on the device: one block, once per decode step, shared by all layers.
//
// 1. Sum the costs of all requests.
// 2. Prefix sums of the costs: where each request begins.
// 3. The share: count the pieces that each candidate cuts the batch into.
// 4. Each thread finds the requests that its parts' cuts fall into, by binary search.
// 5. Prefix sums of the split counts: num_splits.
#include "../launch.h"
#include "kernel.h"
#include "plan.h"

namespace flashmla::schedule {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Storage {
  int warp_sums[kWarps];
  int carry;
  int pieces[kShareCandidates];
};

__device__ int request_cost(const ScheduleParams& p, int request) {
  return kRequestCost + scheduled_pages(p.cache_seqlens[request], p.batch);
}

__device__ int warp_inclusive_sum(int value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Inclusive sum over the block's threads, plus what `storage.carry` held; the carry moves on.
__device__ int block_inclusive_sum(Storage& storage, int value) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int in_warp = warp_inclusive_sum(value);
  if (threadIdx.x % 32 == 31) storage.warp_sums[warp] = in_warp;
  __syncthreads();
  int sum = storage.carry + in_warp;
  for (int w = 0; w < warp; ++w) sum += storage.warp_sums[w];
  __syncthreads();
  if (threadIdx.x == kThreads - 1) storage.carry = sum;
  __syncthreads();
  return sum;
}

// The request whose cost interval holds `cost`; cost_after[r] is where request r ends.
__device__ int find_request(const int* cost_after, int batch, int cost) {
  int low = 0;
  int high = batch - 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (cost_after[middle] > cost) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ Cut cut_of_part(const ScheduleParams& p, const int* cost_after, int share, int total,
                           int part) {
  if (part >= p.num_sm_parts || behind_the_end(part, share, total)) return {p.batch, 0, 0};
  const int request = find_request(cost_after, p.batch, part * share);
  return cut_inside(part, share, request, request == 0 ? 0 : cost_after[request - 1]);
}

__device__ int find_share(const ScheduleParams& p, Storage& storage, const int* cost_after,
                          int least) {
  if (p.batch > kMaxCandidateBatch) return least;
  int pieces[kShareCandidates] = {};
  for (int r = static_cast<int>(threadIdx.x); r < p.batch; r += kThreads) {
    const int before = r == 0 ? 0 : cost_after[r - 1];
    for (int c = 0; c < kShareCandidates; ++c) {
      pieces[c] += split_count(before, cost_after[r], least + c);
    }
  }
  for (int c = 0; c < kShareCandidates; ++c) {
    const int sum = __reduce_add_sync(~0u, pieces[c]);
    if (threadIdx.x % 32 == 0) atomicAdd(&storage.pieces[c], sum);
  }
  __syncthreads();
  return choose_share(least, storage.pieces, p.batch, p.num_sm_parts);
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(ScheduleParams p) {
  __shared__ Storage storage;
  if (threadIdx.x == 0) storage = {};
  __syncthreads();

  // 1, 2. num_splits[1..batch] holds the cost prefix sums until step 5 replaces them.
  int* const cost_after = p.num_splits + 1;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int request = base + static_cast<int>(threadIdx.x);
    const int cost = request < p.batch ? request_cost(p, request) : 0;
    const int sum = block_inclusive_sum(storage, cost);
    if (request < p.batch) cost_after[request] = sum;
  }
  __syncthreads();
  const int total = storage.carry;

  // 3. The share.
  const int share = find_share(p, storage, cost_after, least_share(total, p.num_sm_parts));

  // 4. The cuts; each part's end is the next part's begin.
  for (int part = static_cast<int>(threadIdx.x); part < p.num_sm_parts; part += kThreads) {
    const Cut begin = cut_of_part(p, cost_after, share, total, part);
    const Cut end = cut_of_part(p, cost_after, share, total, part + 1);
    int4* const row =
        reinterpret_cast<int4*>(p.tile_scheduler_metadata + int64_t{kScheduleColumns} * part);
    row[0] = make_int4(begin.request, begin.page, end.request, end.page);
    row[1] = make_int4(begin.split, 0, 0, 0);
  }
  __syncthreads();  // every thread has the total
  if (threadIdx.x == 0) {
    storage.carry = 0;
    p.num_splits[0] = 0;
  }
  __syncthreads();

  // 5. Chunk by chunk in place: a chunk's prefix sums are read before its num_splits are written,
  // except the sum before it, which the chunk before hands on.
  int cost_before_chunk = 0;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int request = base + static_cast<int>(threadIdx.x);
    const int last = min(base + kThreads, p.batch) - 1;
    const bool valid = request < p.batch;
    const int after = valid ? cost_after[request] : 0;
    const int before = valid && threadIdx.x > 0 ? cost_after[request - 1] : cost_before_chunk;
    cost_before_chunk = cost_after[last];
    const int sum = block_inclusive_sum(storage, valid ? split_count(before, after, share) : 0);
    if (valid) cost_after[request] = sum;
    __syncthreads();
  }
}

}  // namespace

const char* prepare() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, schedule_kernel);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flashmla::schedule

namespace flashmla {

const char* launch_schedule(const ScheduleParams& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(schedule::kThreads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, schedule::schedule_kernel, params);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flashmla
