// Merges n partial results; sum.cuh has the arithmetic.
//
// A thread owns eight columns of a row and walks the partials, four at a time: their values are
// requested before their weights are known. With many partials a team of warps divides them and
// adds up through shared memory. The order depends on shapes only, and so do the bits.
#include "../message.h"
#include "../vector.cuh"
#include "launch.h"
#include "sum.cuh"

namespace flashmla::merge {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;
constexpr int kBlocksPerSm = 4;  // 1024 threads with 64 registers: 128 KB of float32 in flight

// Warps that share a vector, at most two batches for each up to 64 partials.
int team_size(int partials) {
  return partials > 4 * kBatch ? 8 : partials > 2 * kBatch ? 4 : partials > kBatch ? 2 : 1;
}

using VectorSum = Sum<kVectorColumns>;

// Partials [begin, end) of the eight columns at `outs`, of the row at `lses`.
template <class In>
__device__ __forceinline__ VectorSum sum_partials(const MergeParams& p, const In* outs,
                                                  const float* lses, int begin, int end) {
  const long long stride = static_cast<long long>(p.rows) * p.head_dim;
  VectorSum sum;
  for (int base = begin; base < end; base += kBatch) {
    Vector<In> read[kBatch];
    float lse[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int partial = base + i;
      if (partial < end) {
        lse[i] = lses[static_cast<long long>(partial) * p.rows];
        read[i] = Vector<In>::load(outs + partial * stride);
      } else {
        lse[i] = kNegativeInfinity;
        read[i].clear();
      }
    }
    float top = lse[0];
#pragma unroll
    for (int i = 1; i < kBatch; ++i) top = fmaxf(top, lse[i]);
    sum.raise(top);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (lse[i] == kNegativeInfinity) read[i].clear();  // 0 * NaN is NaN
      float values[kVectorColumns];
      read[i].unpack(values);
      const float weight = sum.weight_of(lse[i]);
      sum.weight += weight;
      sum.add(weight, values);
    }
  }
  return sum;
}

// A team's sums, one column of an array per thread: no bank conflicts.
struct TeamSums {
  float values[kVectorColumns][kThreads];
  float max_lse[kThreads];
  float weight[kThreads];

  __device__ __forceinline__ void put(int thread, const VectorSum& sum) {
#pragma unroll
    for (int i = 0; i < kVectorColumns; ++i) values[i][thread] = sum.values[i];
    max_lse[thread] = sum.max_lse;
    weight[thread] = sum.weight;
  }

  __device__ __forceinline__ void merge_into(VectorSum& sum, int thread) const {
    sum.raise(max_lse[thread]);
    const float factor = sum.weight_of(max_lse[thread]);
    sum.weight += factor * weight[thread];
#pragma unroll
    for (int i = 0; i < kVectorColumns; ++i) sum.values[i] += factor * values[i][thread];
  }
};

template <class Out>
__device__ __forceinline__ void store(const MergeParams& p, int row, int column, VectorSum& sum) {
  const float lse = sum.finish();
  Out* const out = static_cast<Out*>(p.out) + static_cast<long long>(row) * p.head_dim + column;
  Vector<Out>::pack(sum.values).store(out);
  if (column == 0) p.lse[row] = lse;
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) merge_kernel(MergeParams p, int team) {
  __shared__ TeamSums team_sums;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int member = warp % team;
  const int vectors_per_row = p.head_dim / kVectorColumns;
  const int group = static_cast<int>(blockIdx.x) * (kWarps / team) + warp / team;
  const long long vector = static_cast<long long>(group) * 32 + thread % 32;
  const bool exists = vector < static_cast<long long>(p.rows) * vectors_per_row;
  const int row = exists ? static_cast<int>(vector) / vectors_per_row : 0;
  const int column = exists ? static_cast<int>(vector) % vectors_per_row * kVectorColumns : 0;

  const In* const outs =
      static_cast<const In*>(p.outs) + static_cast<long long>(row) * p.head_dim + column;
  const int begin = static_cast<int>(static_cast<long long>(p.partials) * member / team);
  const int end = static_cast<int>(static_cast<long long>(p.partials) * (member + 1) / team);
  VectorSum sum = sum_partials(p, outs, p.lses + row, begin, end);
  if (team > 1) {
    team_sums.put(thread, sum);
    __syncthreads();
  }
  if (!exists || member > 0) return;
  for (int other = 1; other < team; ++other) team_sums.merge_into(sum, thread + 32 * other);
  store<Out>(p, row, column, sum);
}

using Kernel = void (*)(MergeParams, int);

template <class In>
Kernel kernel_of(ElementType out) {
  switch (out) {
    case ElementType::kBfloat16:
      return merge_kernel<In, __nv_bfloat16>;
    case ElementType::kFloat16:
      return merge_kernel<In, __half>;
    default:
      return merge_kernel<In, float>;
  }
}

Kernel kernel_of(ElementType partial, ElementType out) {
  switch (partial) {
    case ElementType::kBfloat16:
      return kernel_of<__nv_bfloat16>(out);
    case ElementType::kFloat16:
      return kernel_of<__half>(out);
    default:
      return kernel_of<float>(out);
  }
}

}  // namespace

const char* prepare_merge() {
  constexpr ElementType kTypes[] = {ElementType::kBfloat16, ElementType::kFloat16,
                                    ElementType::kFloat32};
  for (const ElementType partial : kTypes) {
    for (const ElementType out : kTypes) {
      cudaFuncAttributes attributes;
      const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of(partial, out));
      if (error != cudaSuccess) return message(error);
    }
  }
  return nullptr;
}

const char* launch_merge(const MergeParams& params, cudaStream_t stream) {
  const int team = team_size(params.partials);
  const long long vectors =
      static_cast<long long>(params.rows) * (params.head_dim / kVectorColumns);
  if (vectors > 0x7fffffff) return "too many rows times columns for one grid";
  const long long per_block = 32 * (kWarps / team);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((vectors + per_block - 1) / per_block));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const Kernel kernel = kernel_of(params.partial_type, params.out_type);
  return message(cudaLaunchKernelEx(&config, kernel, params, team));
}

}  // namespace flashmla::merge
