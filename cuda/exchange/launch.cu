// Host side: one round or two, how long to wait, the launch.
#include <algorithm>
#include <cstdlib>

#include "../message.h"
#include "kernel.cuh"
#include "launch.h"

namespace flashmla::exchange {
namespace {

// Rows that NVLink carries in the 2.5 us that a second round is estimated to take: 1.3 us to the
// other GPU, about as long to notice and to merge. Not measured: it takes more than two GPUs.
constexpr int64_t kRowsOfARound = 800;

using Kernel = void (*)(ExchangeParams, Mailbox*, int);

Kernel kernel_of(ElementType type) {
  return type == ElementType::kBfloat16 ? exchange_kernel<__nv_bfloat16> : exchange_kernel<__half>;
}

}  // namespace

const char* prepare_exchange() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of(type));
    if (error != cudaSuccess) return message(error);
  }
  return nullptr;
}

bool takes_two_rounds(int partials, int rows, int devices) {
  const int64_t others = devices - 1;
  const int64_t one = others * partials * rows;
  const int64_t two = others * (partials + 1) * rows / devices;
  return one - two > kRowsOfARound;
}

uint64_t patience_ns() {
  static const uint64_t patience = [] {
    const char* const text = std::getenv("JAX_FLASHMLA_EXCHANGE_PATIENCE");
    const double seconds = text != nullptr ? std::atof(text) : 0;
    return static_cast<uint64_t>((seconds > 0 ? std::min(seconds, 1e6) : 60) * 1e9);
  }();
  return patience;
}

const char* launch_exchange(const ExchangeParams& params, cudaStream_t stream) {
  Mailbox* mailbox = nullptr;
  int devices = 0;
  if (const char* reason = own_mailbox(mailbox, devices)) return reason;
  const int blocks = std::min((params.rows + kWarps - 1) / kWarps, kMaxBlocks);
  kernel_of(params.element_type)<<<blocks, kThreads, 0, stream>>>(params, mailbox, devices);
  return message(cudaGetLastError());
}

}  // namespace flashmla::exchange
