#include "replay.h"

namespace flashmla::runner {
namespace {

// nullptr, the default stream, if it cannot be made: then capturing says so.
cudaStream_t shared_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    cudaStreamCreate(&made);
    return made;
  }();
  return stream;
}

}  // namespace

Replay::Replay(const Launches& launches) : stream_(shared_stream()) {
  note(cudaEventCreate(&begin_));
  note(cudaEventCreate(&end_));
  note(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  const char* const failed = launches(stream_);
  cudaGraph_t graph = nullptr;
  note(cudaStreamEndCapture(stream_, &graph));
  if (failed != nullptr) error_ = failed;
  if (error_ == nullptr) note(cudaGraphInstantiate(&graph_, graph, 0));
  if (graph != nullptr) cudaGraphDestroy(graph);
}

Replay::~Replay() {
  if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
}

float Replay::run(int times) {
  float ms = 0;
  if (error_ != nullptr) return ms;
  note(cudaEventRecord(begin_, stream_));
  for (int i = 0; i < times; ++i) note(cudaGraphLaunch(graph_, stream_));
  note(cudaEventRecord(end_, stream_));
  note(cudaStreamSynchronize(stream_));
  note(cudaEventElapsedTime(&ms, begin_, end_));
  return ms;
}

void Replay::start() {
  if (error_ == nullptr) note(cudaGraphLaunch(graph_, stream_));
}

void Replay::wait() { note(cudaStreamSynchronize(stream_)); }

void Replay::note(cudaError_t status) {
  if (status != cudaSuccess && error_ == nullptr) error_ = cudaGetErrorString(status);
}

}  // namespace flashmla::runner
