// The schedule on the device: one block, once per decode step, shared by all layers.
//
// 1. Prefix sums of the requests' costs: the line of cost, where each request begins.
// 2. The share: each warp counts the pieces that one candidate cuts the batch into. If requests
//    stand apart: the line that is cut then.
// 3. The cuts: each thread finds the request that its cut falls into.
// 4. Prefix sums of the split counts: num_splits.
//
// Such a kernel is one chain of latencies and of instructions fetched for the first time. So a
// small batch keeps its line in shared memory, divisions are multiplications (Divider), and loops
// that small batches run once are not unrolled.
#include <cstdint>

#include "../launch.h"
#include "../message.h"
#include "kernel.h"
#include "plan.h"

namespace flashmla::schedule {
namespace {

struct Arguments {
  ScheduleParams params;
  Divider num_sm_parts;
  int page_cap;
  int vector_batch;  // the requests before it may be read and written four at a time
  int search_step;   // a power of four; four steps pass the last request
};

// kThreads take kWidth neighbouring requests each at a time, a chunk. A small batch is one chunk:
// its line is in shared memory, and its share is compared. Otherwise the line is in num_splits
// until step 4.
template <int kThreads, int kWidth, bool kSmall>
struct Block {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChunk = kThreads * kWidth;
  static_assert(kWarps <= 32, "a warp adds up the sums of all");

  struct Storage {
    alignas(16) int line[kSmall ? kChunk + 1 : 1];  // behind the last request: the total
    int warp_sums[2][32];                           // by parity of the chunk
    int candidate_costs[2 * kShareCandidates];      // of each share: apart, in a row
  };
};

template <int kWidth>  // of neighbouring requests
struct alignas(4 * kWidth) Values {
  int at[kWidth];
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// Elements first, first + 1, … of an array of requests; `behind` where there are none.
template <int kWidth>
__device__ __forceinline__ Values<kWidth> load(const int* array, int first, int behind,
                                               const Arguments& a) {
  using Vector = Values<kWidth>;
  if (kWidth > 1 && first + kWidth <= a.vector_batch) {
    return *reinterpret_cast<const Vector*>(array + first);
  }
  Vector values;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values.at[i] = first + i < a.params.batch ? array[first + i] : behind;
  }
  return values;
}

template <int kWidth>
__device__ __forceinline__ void store(int* array, int first, Values<kWidth> values,
                                      const Arguments& a) {
  if (kWidth > 1 && first + kWidth <= a.vector_batch) {
    *reinterpret_cast<Values<kWidth>*>(array + first) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (first + i < a.params.batch) array[first + i] = values.at[i];
  }
}

template <int kWidth>
__device__ __forceinline__ int sum_of(Values<kWidth> values) {
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += values.at[i];
  return sum;
}

template <int kWidth>
__device__ __forceinline__ bool any_merges_twice(Values<kWidth> splits) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) any = any || merges_twice(splits.at[i]);
  return any;
}

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  if (__all_sync(~0u, value == 0)) return 0;  // warps without requests are busy with cuts
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(~0u, value, offset);
    if (lane_index() >= offset) value += below;
  }
  return value;
}

// The sums of all values before each, `carry` included; adds the chunk to `carry`, which every
// thread has.
template <int kWarps, int kWidth>
__device__ __forceinline__ Values<kWidth> exclusive_sums(Values<kWidth> values, int* warp_sums,
                                                         int& carry) {
  const int sum = sum_of(values);
  const int to_here = warp_inclusive_sum(sum);
  if (lane_index() == 31) warp_sums[warp_index()] = to_here;
  __syncthreads();
  const int warp_sum = lane_index() < kWarps ? warp_sums[lane_index()] : 0;
  Values<kWidth> sums;
  sums.at[0] =
      carry + to_here - sum + __reduce_add_sync(~0u, lane_index() < warp_index() ? warp_sum : 0);
#pragma unroll
  for (int i = 1; i < kWidth; ++i) sums.at[i] = sums.at[i - 1] + values.at[i - 1];
  carry += __reduce_add_sync(~0u, warp_sum);
  return sums;
}

// The costs of requests first, first + 1, …; 0 where there are none.
template <int kWidth>
__device__ __forceinline__ Values<kWidth> load_costs(int first, const Arguments& a) {
  Values<kWidth> values = load<kWidth>(a.params.cache_seqlens, first, 0, a);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values.at[i] = first + i < a.params.batch ? request_cost(values.at[i], a.page_cap) : 0;
  }
  return values;
}

// The splits of requests first, first + 1, …; 0 where there are none.
template <int kWidth, bool kSmall>
__device__ __forceinline__ Values<kWidth> count_splits(const int* line, int first,
                                                       const Cutting& cutting, const Arguments& a) {
  const int batch = a.params.batch;
  const int end = line[kSmall ? first + kWidth : min(first + kWidth, batch)];
  Values<kWidth> values = kSmall ? *reinterpret_cast<const Values<kWidth>*>(line + first)
                                 : load<kWidth>(line, first, end, a);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int after = i + 1 < kWidth ? values.at[(i + 1) % kWidth] : end;
    values.at[i] = (first + i < batch) + cuts_inside(values.at[i], after, cutting);
  }
  return values;
}

// The parts that requests first, first + 1, … take apart; 0 where there are none.
template <int kWidth>
__device__ __forceinline__ Values<kWidth> count_parts(const int* line, int first, Divider share,
                                                      const Arguments& a) {
  Values<kWidth> values;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int request = first + i;
    values.at[i] =
        request < a.params.batch ? parts_apart(line[request], line[request + 1], share) : 0;
  }
  return values;
}

// The cheapest candidate: a warp counts the pieces of each.
template <class B>
__device__ __forceinline__ Cutting compare_shares(typename B::Storage& storage, int least,
                                                  const Arguments& a) {
  const int batch = a.params.batch;
  const int parts = a.params.num_sm_parts;
  for (int c = warp_index(); c < kShareCandidates; c += B::kWarps) {
    const Divider share = make_divider(least + c);
    const Divider pages = make_divider(least_apart(least) + c);
    int pieces = 0;
    int pieces_apart = 0;
    bool twice = false;
    bool twice_apart = false;
#pragma unroll 1
    for (int r = 4 * lane_index(); r < batch; r += 128) {
      const Values<4> splits = count_splits<4, true>(storage.line, r, in_a_row(share), a);
      const Values<4> splits_apart = count_parts<4>(storage.line, r, pages, a);
      pieces += sum_of(splits);
      pieces_apart += sum_of(splits_apart);
      twice = twice || any_merges_twice(splits);
      twice_apart = twice_apart || any_merges_twice(splits_apart);
    }
    pieces = __reduce_add_sync(~0u, pieces);
    pieces_apart = __reduce_add_sync(~0u, pieces_apart);
    twice = __any_sync(~0u, twice);
    twice_apart = __any_sync(~0u, twice_apart);
    if (lane_index() == 0) {
      const int cost_apart =
          candidate_cost(pages.divisor - least, pieces_apart, batch, twice_apart, parts);
      storage.candidate_costs[2 * c] = pieces_apart <= parts ? cost_apart : kMaxInt;
      storage.candidate_costs[2 * c + 1] = candidate_cost(c, pieces, batch, twice, parts);
    }
  }
  __syncthreads();
  const int cost =
      lane_index() < 2 * kShareCandidates ? storage.candidate_costs[lane_index()] : kMaxInt;
  const unsigned cheapest = __ballot_sync(~0u, cost == __reduce_min_sync(~0u, cost));
  const int choice = __ffs(static_cast<int>(cheapest)) - 1;
  const int c = choice / 2;
  return choice % 2 == 0 ? apart(least_apart(least) + c) : in_a_row(make_divider(least + c));
}

// Makes the line that requests stand on apart of the line of cost; returns its end.
template <class B, int kWidth>
__device__ __forceinline__ int make_line_apart(typename B::Storage& storage, int share,
                                               const Arguments& a) {
  const int first = kWidth * thread_index();
  int total = 0;
  const auto parts = count_parts<kWidth>(storage.line, first, make_divider(share), a);
  const auto sums = exclusive_sums<B::kWarps>(parts, storage.warp_sums[1], total);
  *reinterpret_cast<Values<kWidth>*>(storage.line + first) = sums;
  if (thread_index() == 0) storage.line[B::kChunk] = total;
  __syncthreads();
  return total;
}

// The request whose costs hold `cost`: the last that begins at or before it. Quarters the line.
__device__ __forceinline__ int find_request(const int* line, int cost, const Arguments& a) {
  int request = 0;
  int step = a.search_step;
#pragma unroll 1
  do {
    int later = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) later += line[min(request + i * step, a.params.batch)] <= cost;
    request += later * step;
    step >>= 2;
  } while (step > 0);
  return request;
}

// In both rows that the cut bounds: the end of the part before it, the begin of the one behind.
__device__ __forceinline__ void write_cut(int part, Cut cut, const ScheduleParams& p) {
  int* const row = p.tile_scheduler_metadata + int64_t{kScheduleColumns} * part;
  const int2 place = make_int2(cut.request, cut.page);
  if (part > 0) *reinterpret_cast<int2*>(row - kScheduleColumns + 2) = place;
  if (part == p.num_sm_parts) return;
  *reinterpret_cast<int2*>(row) = place;
  *reinterpret_cast<int4*>(row + 4) = make_int4(cut.split, 0, 0, 0);
}

template <int kThreads, int kWidth, bool kSmall>
__global__ void __launch_bounds__(kThreads) schedule_kernel(const Arguments a) {
  using B = Block<kThreads, kWidth, kSmall>;
  __shared__ typename B::Storage storage;
  const ScheduleParams& p = a.params;
  int* const line = kSmall ? storage.line : p.num_splits;
  const int end = kSmall ? B::kChunk : p.batch;  // of the last chunk

  // 1. The line of cost.
  int total = 0;
#pragma unroll 1
  for (int chunk = 0, parity = 0; chunk < end; chunk += B::kChunk, parity ^= 1) {
    const int first = chunk + kWidth * thread_index();
    const auto costs = load_costs<kWidth>(first, a);
    const auto sums = exclusive_sums<B::kWarps>(costs, storage.warp_sums[parity], total);
    if (kSmall) {
      *reinterpret_cast<Values<kWidth>*>(line + first) = sums;
    } else {
      store(line, first, sums, a);
    }
  }
  if (thread_index() == 0) line[end] = total;
  const int least = least_share(total, a.num_sm_parts);
  __syncthreads();

  // 2. The share.
  Cutting cutting = in_a_row(make_divider(least));
  if constexpr (kSmall) {
    cutting = compare_shares<B>(storage, least, a);
    if (cutting.request_cost == 0) {
      total = make_line_apart<B, kWidth>(storage, cutting.unit_pages, a);
    }
  }

  // 3. The cuts, the last warps first: in a small batch the first ones are busy with step 4.
  for (int part = kThreads - 1 - thread_index(); part <= p.num_sm_parts; part += kThreads) {
    Cut cut = {p.batch, 0, 0};
    if (!behind_the_end(part, cutting, total)) {
      const int request = find_request(line, part * cutting.share.divisor, a);
      cut = cut_inside(part, cutting, request, line[request]);
    }
    write_cut(part, cut, p);
  }

  // 4. The number of splits before each request. It may replace the line: everybody has read a
  // chunk's line and where the next begins before exclusive_sums lets anybody write.
  int splits = 0;
#pragma unroll 1
  for (int chunk = 0, parity = 0; chunk < end; chunk += B::kChunk, parity ^= 1) {
    const int first = chunk + kWidth * thread_index();
    const auto counts = count_splits<kWidth, kSmall>(line, first, cutting, a);
    const auto sums = exclusive_sums<B::kWarps>(counts, storage.warp_sums[parity], splits);
    store(p.num_splits, first, sums, a);
  }
  if (thread_index() == 0) p.num_splits[p.batch] = splits;
}

using Kernel = void (*)(Arguments);

Arguments make_arguments(const ScheduleParams& params) {
  const auto address = [](const void* array) { return reinterpret_cast<uintptr_t>(array); };
  const uintptr_t both = address(params.cache_seqlens) | address(params.num_splits);
  int step = 1;
  while (int64_t{4} * step < params.batch) step *= 4;
  return {
      .params = params,
      .num_sm_parts = make_divider(params.num_sm_parts),
      .page_cap = page_cap(params.batch),
      .vector_batch = both % sizeof(int4) == 0 ? params.batch : 0,
      .search_step = step,
  };
}

// The quickest of those measured. Few threads start and meet sooner; four requests each are more
// instructions, which are fetched once and run once (288 x 1 against 288 x 4 on an H200, batch 128:
// 2.4 against 2.5 us).
constexpr struct {
  int batch;  // at most
  int threads;
  Kernel kernel;
} kKernels[] = {
    {288, 288, schedule_kernel<288, 1, true>},
    {kMaxCandidateBatch, 288, schedule_kernel<288, 4, true>},
    {kMaxInt, 1024, schedule_kernel<1024, 4, false>},
};

}  // namespace

const char* prepare() {
  for (const auto& choice : kKernels) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, choice.kernel);
    if (error != cudaSuccess) return message(error);
  }
  return nullptr;
}

}  // namespace flashmla::schedule

namespace flashmla {

const char* launch_schedule(const ScheduleParams& params, cudaStream_t stream) {
  int i = 0;
  while (params.batch > schedule::kKernels[i].batch) ++i;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(schedule::kKernels[i].threads);
  config.stream = stream;
  return message(
      cudaLaunchKernelEx(&config, schedule::kKernels[i].kernel, schedule::make_arguments(params)));
}

}  // namespace flashmla
