// A probe runs one building block of the kernels on the GPU and compares it with plain host code.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>

namespace flashmla::probes {

// Each returns whether all was as expected, and prints the first differences.
bool probe_boxes();
bool probe_one_hot();
bool probe_walk();
bool probe_values();
bool probe_weights();
bool probe_ring();
bool probe_named_barriers();
bool probe_combine();
bool probe_schedule();
bool probe_exchange();

class Mismatches {
 public:
  // `where` is a place like [row][column], printed for the first few that differ.
  void expect(double got, double expected, double tolerance, const char* what, int row,
              int column) {
    if (got == expected || std::fabs(got - expected) <= tolerance) return;
    if (count_++ < 8) {
      std::printf("  %s [%d][%d]: %.9g, expected %.9g\n", what, row, column, got, expected);
    }
  }
  void fail(const char* what, const char* reason) {
    ++count_;
    std::printf("  %s: %s\n", what, reason);
  }
  // Waits for the kernel just launched; an error counts as a mismatch.
  void synchronize(const char* what) {
    const cudaError_t launched = cudaGetLastError();
    const cudaError_t error = launched == cudaSuccess ? cudaDeviceSynchronize() : launched;
    if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
  }
  bool none() const {
    if (count_ > 8) std::printf("  %lld differences\n", count_);
    return count_ == 0;
  }

 private:
  long long count_ = 0;
};

}  // namespace flashmla::probes
