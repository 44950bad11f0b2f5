// What an exchange gets. No CUDA header, no XLA type.
#pragma once

#include "../params.h"

namespace flashmla::exchange {

struct ExchangeParams {
  ElementType element_type;   // of outs and out, bfloat16 or float16
  const void* outs;           // [partials, rows, 512], of this device
  const float* lses;          // [partials, rows], -inf: empty, its out is never used
  const uint32_t* addresses;  // [devices, 8], an Address of each, in the order of the merge
  void* out;                  // [rows, 512], over all partials of all devices
  float* lse;                 // [rows]
  int partials;
  int rows;
  int devices;
  bool two_rounds;       // each row is merged by one device, which tells the others
  uint64_t patience_ns;  // for which a device that is late is awaited
};

}  // namespace flashmla::exchange
