// Eight columns at a time: 16 bytes of bfloat16 or float16, 32 of float32.
#pragma once

#include "pair.cuh"

namespace flashmla {

inline constexpr int kVectorColumns = 8;

template <class T>
struct Vector {
  static constexpr int kWords = kVectorColumns * sizeof(T) / sizeof(uint4);
  uint4 words[kWords];

  static __device__ __forceinline__ Vector load(const T* source) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      vector.words[i] = reinterpret_cast<const uint4*>(source)[i];
    }
    return vector;
  }

  __device__ __forceinline__ void store(T* target) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(target)[i] = words[i];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void unpack(float (&values)[kVectorColumns]) const {
    const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(words);
#pragma unroll
    for (int i = 0; i < kVectorColumns; i += 2) {
      float2 pair;
      if constexpr (std::is_same_v<T, float>) {
        pair = {__uint_as_float(pairs[i]), __uint_as_float(pairs[i + 1])};
      } else {
        pair = unpack_pair<T>(pairs[i / 2]);
      }
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  }

  static __device__ __forceinline__ Vector pack(const float (&values)[kVectorColumns]) {
    Vector vector;
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(vector.words);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) * 2; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        pairs[i] = __float_as_uint(values[i]);
      } else {
        pairs[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    return vector;
  }
};

}  // namespace flashmla
