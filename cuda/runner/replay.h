// A CUDA graph of launches, replayed and timed. All of a process use one stream: where more than
// eight have been at work, the GPU places blocks otherwise, and short calls take longer
// (benchmarks/README.md).
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace flashmla::runner {

class Replay {
 public:
  // Launches on the stream it is given; returns the reason where one failed.
  using Launches = std::function<const char*(cudaStream_t)>;

  explicit Replay(const Launches& launches);
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  ~Replay();

  // Why capturing or the last replay failed, or nullptr.
  const char* error() const { return error_; }

  // Milliseconds of so many replays, back to back.
  float run(int times);

  // The same in two steps, untimed.
  void start();
  void wait();

 private:
  void note(cudaError_t status);

  const char* error_ = nullptr;
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace flashmla::runner
