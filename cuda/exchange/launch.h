// The exchange of partial results between the devices of one process, and their merge. Each
// function returns nullptr when it succeeded, else the reason it did not.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::exchange {

// Loads the kernels on the current device, outside graph capture.
const char* prepare_exchange();

// Writes the Address of the current device's mailbox, which from now on holds `rows` partial rows
// of each device. Allocates where there is none yet that large: not to be captured into a graph.
const char* launch_address(uint32_t* address, int rows, cudaStream_t stream);

// Whether an exchange in two rounds is faster: it has fewer bytes to write.
bool takes_two_rounds(int partials, int rows, int devices);

// 60 s, or the seconds in the environment's JAX_FLASHMLA_EXCHANGE_PATIENCE.
uint64_t patience_ns();

// Always the same launches for the same shapes: graph-safe. All devices of the group have to launch
// it, in the same order as their other exchanges.
const char* launch_exchange(const ExchangeParams& params, cudaStream_t stream);

}  // namespace flashmla::exchange
