#pragma once

namespace flashmla::runner {

// Prints how fast the GPU's memory can be read: 16-byte loads of a pool far beyond L2.
bool time_read();

}  // namespace flashmla::runner
