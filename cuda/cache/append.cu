// Writes rows of latent and rotary key to their slots of the pool, a warp per row.
//
// 1. Read the row and its slot, all at once.
// 2. Rotate the key in float32.
// 3. Store 72 vectors of 16 bytes, unless the slot is outside the pool.
#include "../message.h"
#include "../vector.cuh"
#include "launch.h"

namespace flashmla::cache {
namespace {

constexpr int kThreads = 128;  // small blocks: a decode step's few rows reach more SMs
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int kRopeVectors = kRopeDim / kVectorColumns;
constexpr int kPairs = kRopeDim / 2;
static_assert(kKvLoraRank == 2 * 32 * kVectorColumns, "two vectors of latent per lane");
static_assert(kRopeVectors <= 32, "at most one vector of rotary key per lane");

// Vector `index` of a row's rotary key as it is stored.
template <class T, Rotation kRotation>
__device__ __forceinline__ Vector<T> rope_vector(const AppendParams& p, long long row, int index) {
  const T* const key = static_cast<const T*>(p.rope) + row * kRopeDim;
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

template <class T, Rotation kRotation>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendParams p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const long long row = static_cast<long long>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= p.rows) return;

  // 1, 2.
  const int slot = p.slots[row];
  const T* const latent = static_cast<const T*>(p.latent) + row * kKvLoraRank;
  const int column = lane * kVectorColumns;
  const Vector<T> left = Vector<T>::load(latent + column);
  const Vector<T> right = Vector<T>::load(latent + kKvLoraRank / 2 + column);
  Vector<T> key;
  if (lane < kRopeVectors) key = rope_vector<T, kRotation>(p, row, lane);

  // 3.
  if (slot < 0 || slot / kPageSize >= p.num_pages) return;
  T* const token = static_cast<T*>(p.cache) + static_cast<long long>(slot) * kHeadDimQk;
  left.store(token + column);
  right.store(token + kKvLoraRank / 2 + column);
  if (lane < kRopeVectors) key.store(token + kKvLoraRank + column);
}

using Kernel = void (*)(AppendParams);

template <class T>
Kernel kernel_of(Rotation rotation) {
  switch (rotation) {
    case Rotation::kHalfSplit:
      return append_kernel<T, Rotation::kHalfSplit>;
    case Rotation::kInterleaved:
      return append_kernel<T, Rotation::kInterleaved>;
    default:
      return append_kernel<T, Rotation::kNone>;
  }
}

Kernel kernel_of(ElementType type, Rotation rotation) {
  return type == ElementType::kBfloat16 ? kernel_of<__nv_bfloat16>(rotation)
                                        : kernel_of<__half>(rotation);
}

}  // namespace

const char* prepare_append() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    for (const Rotation rotation :
         {Rotation::kNone, Rotation::kHalfSplit, Rotation::kInterleaved}) {
      cudaFuncAttributes attributes;
      const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of(type, rotation));
      if (error != cudaSuccess) return message(error);
    }
  }
  return nullptr;
}

const char* launch_append(const AppendParams& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((static_cast<unsigned>(params.rows) + kRowsPerBlock - 1) / kRowsPerBlock);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return message(
      cudaLaunchKernelEx(&config, kernel_of(params.element_type, params.rotation), params));
}

}  // namespace flashmla::cache
