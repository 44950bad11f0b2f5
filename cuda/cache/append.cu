// Writes rows of latent and rotary key to their slots of the pool, a warp per row.
//
// 1. Read the row and its slot, all at once.
// 2. Norm the latent, rotate the key, both in float32 and rounded once.
// 3. Store 72 vectors of 16 bytes, unless the slot is outside the pool.
#include "../message.h"
#include "../vector.cuh"
#include "launch.h"

namespace flashmla::cache {
namespace {

constexpr int kThreads = 128;  // small blocks: a decode step's few rows reach more SMs
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int kLatentVectors = 2;  // of a lane
constexpr int kRopeVectors = kRopeDim / kVectorColumns;
constexpr int kPairs = kRopeDim / 2;
static_assert(kKvLoraRank == kLatentVectors * 32 * kVectorColumns, "all of the latent");
static_assert(kRopeVectors <= 32, "at most one vector of rotary key per lane");

// Vector `index` of a row's rotary key as it is stored.
template <class T, Rotation kRotation>
__device__ __forceinline__ Vector<T> rope_vector(const AppendParams& p, long long row, int index) {
  const T* const key = static_cast<const T*>(p.rope) + row * p.rope_stride;
  if constexpr (kRotation == Rotation::kNone) {
    return Vector<T>::load(key + index * kVectorColumns);
  } else {
    constexpr bool kInterleaved = kRotation == Rotation::kInterleaved;
    const int half = index % (kRopeVectors / 2);  // its pairs are 8 * half and the next seven
    const int low = kInterleaved ? 2 * half : half;
    const int high = kInterleaved ? 2 * half + 1 : half + kRopeVectors / 2;
    float both[2][kVectorColumns];
    float cos[kVectorColumns];
    float sin[kVectorColumns];
    Vector<T>::load(key + low * kVectorColumns).unpack(both[0]);
    Vector<T>::load(key + high * kVectorColumns).unpack(both[1]);
    Vector<float>::load(p.cos + row * kPairs + half * kVectorColumns).unpack(cos);
    Vector<float>::load(p.sin + row * kPairs + half * kVectorColumns).unpack(sin);
    float rotated[kVectorColumns];
#pragma unroll
    for (int i = 0; i < kVectorColumns; ++i) {
      constexpr int kHalf = kVectorColumns / 2;
      const float first = kInterleaved ? both[i / kHalf][2 * (i % kHalf)] : both[0][i];
      const float second = kInterleaved ? both[i / kHalf][2 * (i % kHalf) + 1] : both[1][i];
      rotated[i] =
          index == half ? first * cos[i] - second * sin[i] : second * cos[i] + first * sin[i];
    }
    return Vector<T>::pack(rotated);
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
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(~0u, squares, offset);
    }
    const float scale = rsqrtf(squares / kKvLoraRank + eps);
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

template <class T, Rotation kRotation, bool kNorm>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendParams p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const long long row = static_cast<long long>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= p.rows) return;

  // 1, 2.
  const int slot = p.slots[row];
  const T* const latent_row = static_cast<const T*>(p.latent) + row * p.latent_stride;
  auto latent = LatentShare<T>::load(latent_row);
  if constexpr (kNorm) latent.norm(LatentShare<T>::load(p.norm), p.norm_eps);
  Vector<T> key;
  if (lane < kRopeVectors) key = rope_vector<T, kRotation>(p, row, lane);

  // 3.
  if (slot < 0 || slot / kPageSize >= p.num_pages) return;
  T* const token = static_cast<T*>(p.cache) + static_cast<long long>(slot) * kHeadDimQk;
  latent.store(token);
  if (lane < kRopeVectors) key.store(token + kKvLoraRank + lane * kVectorColumns);
}

using Kernel = void (*)(AppendParams);

template <class T, bool kNorm>
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
Kernel kernel_of(Rotation rotation, bool norm) {
  return norm ? kernel_of<T, true>(rotation) : kernel_of<T, false>(rotation);
}

Kernel kernel_of(ElementType type, Rotation rotation, bool norm) {
  return type == ElementType::kBfloat16 ? kernel_of<__nv_bfloat16>(rotation, norm)
                                        : kernel_of<__half>(rotation, norm);
}

}  // namespace

const char* prepare_append() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    for (const Rotation rotation :
         {Rotation::kNone, Rotation::kHalfSplit, Rotation::kInterleaved}) {
      for (const bool norm : {false, true}) {
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
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((static_cast<unsigned>(params.rows) + kRowsPerBlock - 1) / kRowsPerBlock);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const Kernel kernel = kernel_of(params.element_type, params.rotation, params.norm != nullptr);
  return message(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace flashmla::cache
