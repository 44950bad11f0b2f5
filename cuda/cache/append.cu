// Writes rows of latent and rotary key to their slots of the pool, a warp per row. Further blocks,
// one per row, norm the low-rank form of queries that the same projection gives.
//
// 1. Read the row and its slot, all at once.
// 2. Norm the latent, rotate the key, both in float32 and rounded once.
// 3. Store 72 vectors of 16 bytes, unless the slot is outside the pool.
#include "../launch_config.h"
#include "../message.h"
#include "../rotate.cuh"
#include "../sm90/barrier.cuh"
#include "launch.h"

namespace flashmla::cache {
namespace {

constexpr int kThreads = 128;  // small blocks: a decode step's few rows reach more SMs
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int kLatentVectors = 2;  // of a lane
static_assert(kKvLoraRank == kLatentVectors * 32 * kVectorColumns, "all of the latent");
static_assert(kRopeVectors <= 32, "at most one vector of rotary key per lane");

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// What is normed.
enum class Norm { kNone, kLatent, kBoth };  // both: latent and queries' low-rank form

// Vector `index` of a row's rotary key as it is stored.
template <class T, Rotation kRotation>
__device__ __forceinline__ Vector<T> rope_vector(const AppendParams& p, long long row, int index) {
  const T* const key = static_cast<const T*>(p.rope) + row * p.rope_stride;
  if constexpr (kRotation == Rotation::kNone) {
    return Vector<T>::load(key + index * kVectorColumns);
  } else {
    const auto vector = [&](int i) { return key + i * kVectorColumns; };
    return rotate_vector<T, kRotation == Rotation::kInterleaved>(vector, p.cos + row * kRopePairs,
                                                                 p.sin + row * kRopePairs, index);
  }
}

// A lane's columns of a row of 512, half of them 256 columns behind the others.
template <class T>
struct LatentShare {
  Vector<T> vectors[kLatentVectors];

  static __device__ __forceinline__ LatentShare load(const void* row) {
    LatentShare share;
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      share.vectors[i] = Vector<T>::load(static_cast<const T*>(row) + column(i));
    }
    return share;
  }

  __device__ __forceinline__ void store(T* row) const {
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) vectors[i].store(row + column(i));
  }

  // The row over its root mean square, times the weights.
  __device__ __forceinline__ void norm(const LatentShare& weights, float eps) {
    float values[kLatentVectors][kVectorColumns];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      vectors[i].unpack(values[i]);
#pragma unroll
      for (const float value : values[i]) squares += value * value;
    }
    const float scale = rsqrtf(warp_sum(squares) / kKvLoraRank + eps);
#pragma unroll
    for (int i = 0; i < kLatentVectors; ++i) {
      float factors[kVectorColumns];
      weights.vectors[i].unpack(factors);
#pragma unroll
      for (int c = 0; c < kVectorColumns; ++c) values[i][c] = values[i][c] * scale * factors[c];
      vectors[i] = Vector<T>::pack(values[i]);
    }
  }

 private:
  static __device__ __forceinline__ int column(int vector) {
    return (vector * 32 + static_cast<int>(threadIdx.x % 32)) * kVectorColumns;
  }
};

template <class T, Rotation kRotation, Norm kNorm>
__device__ __forceinline__ void append_row(const AppendParams& p, long long row) {
  const int lane = static_cast<int>(threadIdx.x % 32);

  // 1, 2.
  const int slot = p.slots[row];
  const T* const latent_row = static_cast<const T*>(p.latent) + row * p.latent_stride;
  auto latent = LatentShare<T>::load(latent_row);
  if constexpr (kNorm != Norm::kNone) latent.norm(LatentShare<T>::load(p.norm), p.norm_eps);
  Vector<T> key;
  if (lane < kRopeVectors) key = rope_vector<T, kRotation>(p, row, lane);

  // 3.
  if (slot < 0 || slot / kPageSize >= p.num_pages) return;
  T* const token = static_cast<T*>(p.cache) + static_cast<long long>(slot) * kHeadDimQk;
  latent.store(token);
  if (lane < kRopeVectors) key.store(token + kKvLoraRank + lane * kVectorColumns);
}

// A row of queries' low-rank form over its root mean square, times the weights. By a block.
template <class T>
__device__ __forceinline__ void norm_queries(const AppendParams& p, long long row) {
  constexpr int kMost = kMostRank / kVectorColumns / kThreads;  // vectors of a thread
  __shared__ float by_warp[kThreads / 32];
  const int vectors = p.rank / kVectorColumns;
  const T* const from = static_cast<const T*>(p.low_rank) + row * p.latent_stride;
  const T* const weights = static_cast<const T*>(p.query_norm);
  float values[kMost][kVectorColumns];
  float factors[kMost][kVectorColumns];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    if (vector >= vectors) break;
    Vector<T>::load(from + vector * kVectorColumns).unpack(values[i]);
    Vector<T>::load(weights + vector * kVectorColumns).unpack(factors[i]);
#pragma unroll
    for (const float value : values[i]) squares += value * value;
  }
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (const float part : by_warp) total += part;
  const float scale = rsqrtf(total / static_cast<float>(p.rank) + p.norm_eps);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    if (vector >= vectors) break;
#pragma unroll
    for (int c = 0; c < kVectorColumns; ++c) values[i][c] = values[i][c] * scale * factors[i][c];
    Vector<T>::pack(values[i]).store(static_cast<T*>(p.normed) + row * p.rank +
                                     vector * kVectorColumns);
  }
}

unsigned append_blocks(int rows) {
  return (static_cast<unsigned>(rows) + kRowsPerBlock - 1) / kRowsPerBlock;
}

template <class T, Rotation kRotation, Norm kNorm>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendParams p, int append_blocks) {
  sm90::allow_next_kernel();
  sm90::wait_for_previous_kernel();
  const int block = static_cast<int>(blockIdx.x);
  if constexpr (kNorm == Norm::kBoth) {
    if (block >= append_blocks) {
      norm_queries<T>(p, block - append_blocks);
      return;
    }
  }
  const long long row = static_cast<long long>(block) * kRowsPerBlock + threadIdx.x / 32;
  if (row < p.rows) append_row<T, kRotation, kNorm>(p, row);
}

using Kernel = void (*)(AppendParams, int);

template <class T, Norm kNorm>
Kernel kernel_of(Rotation rotation) {
  switch (rotation) {
    case Rotation::kHalfSplit:
      return append_kernel<T, Rotation::kHalfSplit, kNorm>;
    case Rotation::kInterleaved:
      return append_kernel<T, Rotation::kInterleaved, kNorm>;
    default:
      return append_kernel<T, Rotation::kNone, kNorm>;
  }
}

template <class T>
Kernel kernel_of(Rotation rotation, Norm norm) {
  switch (norm) {
    case Norm::kLatent:
      return kernel_of<T, Norm::kLatent>(rotation);
    case Norm::kBoth:
      return kernel_of<T, Norm::kBoth>(rotation);
    default:
      return kernel_of<T, Norm::kNone>(rotation);
  }
}

Kernel kernel_of(ElementType type, Rotation rotation, Norm norm) {
  return type == ElementType::kBfloat16 ? kernel_of<__nv_bfloat16>(rotation, norm)
                                        : kernel_of<__half>(rotation, norm);
}

Norm norm_of(const AppendParams& params) {
  if (params.norm == nullptr) return Norm::kNone;
  return params.query_norm == nullptr ? Norm::kLatent : Norm::kBoth;
}

}  // namespace

const char* prepare_append() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    for (const Rotation rotation :
         {Rotation::kNone, Rotation::kHalfSplit, Rotation::kInterleaved}) {
      for (const Norm norm : {Norm::kNone, Norm::kLatent, Norm::kBoth}) {
        cudaFuncAttributes attributes;
        const Kernel kernel = kernel_of(type, rotation, norm);
        const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) return message(error);
      }
    }
  }
  return nullptr;
}

const char* launch_append(const AppendParams& params, cudaStream_t stream) {
  const unsigned blocks = append_blocks(params.rows);
  const Norm norm = norm_of(params);
  const unsigned normed = norm == Norm::kBoth ? static_cast<unsigned>(params.rows) : 0;
  const LaunchConfig config(dim3(blocks + normed), kThreads, 0, stream, params.early_start,
                            /*cluster=*/1);
  const Kernel kernel = kernel_of(params.element_type, params.rotation, norm);
  return config.launch(kernel, params, static_cast<int>(blocks));
}

}  // namespace flashmla::cache
