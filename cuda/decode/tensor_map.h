// Tensor maps: what the TMA unit is told of an array.
#pragma once

#include <cuda.h>

#include "../params.h"

namespace flashmla::decode {

// Whether the driver can encode tensor maps at all.
bool has_tensor_maps();

// Boxes of 64-column tiles in the 128-byte swizzle; what lies outside comes as zeros.
bool encode(CUtensorMap& map, ElementType type, const void* base, const cuuint64_t (&sizes)[4],
            const cuuint64_t (&strides)[3], const cuuint32_t (&box)[4]);

// The pool as {64 columns, 64 tokens, 9 * h_kv tiles, pages}: one box is `tiles` swizzled tiles.
bool encode_pool(CUtensorMap& map, const DecodeParams& p, int tiles);

}  // namespace flashmla::decode
