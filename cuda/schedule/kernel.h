#pragma once

namespace flashmla::schedule {

// Loads the kernel on the current device; nullptr or the reason it could not.
const char* prepare();

}  // namespace flashmla::schedule
