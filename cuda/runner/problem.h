// One decode step with its own cudaMalloc per array, so that compute-sanitizer sees every overrun.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../launch.h"
#include "options.h"

namespace flashmla::runner {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    if (count > 0) {
      ok_ = cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)) == cudaSuccess;
    }
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }
  bool ok() const { return ok_; }
  void poison() { cudaMemset(data_, 0xFF, count_ * sizeof(T)); }  // NaN in every float type
  std::vector<T> host() const {
    std::vector<T> copy(count_);
    cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
  bool ok_ = true;
};

// Host arrays of a case; 16-bit elements as their bits.
struct Inputs {
  std::vector<uint16_t> q_latent, q_rope, kv_cache;
  std::vector<int> block_table, lengths;
  int num_pages, max_pages_per_seq;
};

float to_float(uint16_t bits, bool fp16);
uint16_t from_float(float value, bool fp16);

// Random values; NaN in page tails and pages that nobody owns, garbage ids beyond each length.
Inputs make_inputs(const Options& options);

int default_parts(const Options& options);

// What a decode step's parameters take from the options; its arrays and the pool are the caller's.
DecodeParams decode_params(const Options& options);

// Softmax attention of one packed row in float64: out [512], returns lse.
double reference_row(const Options& options, const Inputs& inputs, float scale, int request,
                     int query, int head, std::vector<double>& out);

}  // namespace flashmla::runner
