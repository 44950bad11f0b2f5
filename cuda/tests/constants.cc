// What tests/barrier_simulator.py has to agree with.
#include <cstdio>

#include "../decode/storage.h"
#include "host_programs.h"

namespace flashmla::tests {

int print_constants() {
  using namespace decode;
  struct {
    const char* name;
    long long value;
  } const constants[] = {
      {"page_slots", kPageSlots},
      {"page_parts", kPageParts},
      {"left_bytes", part_bytes(kLeft)},
      {"right_bytes", part_bytes(kRight)},
      {"rope_bytes", part_bytes(kRope)},
      {"query_bytes", sizeof(Storage::query)},
      {"warps_per_half", kWarpsPerWarpgroup},
      {"query_loader_warps", kQueryLoaderWarps},
      {"page_full_arrivals", kPageFullArrivals},
      {"page_empty_arrivals", kPageEmptyArrivals},
      {"query_full_arrivals", kQueryFullArrivals},
      {"query_empty_arrivals", kQueryEmptyArrivals},
      {"weights_ready_arrivals", kWeightsReadyArrivals},
      {"sums_ready_arrivals", kSumsReadyArrivals},
      {"row_sum_buffers", sizeof(Storage::row_sum) / (2 * kRowTile * sizeof(float))},
      {"assignment_buffers", sizeof(Storage::assignments) / sizeof(Assignment)},
      {"barrier_count", sizeof(Barriers) / sizeof(uint64_t)},
  };
  const char* before = "{";
  for (const auto& constant : constants) {
    std::printf("%s\"%s\": %lld", before, constant.name, constant.value);
    before = ", ";
  }
  std::printf("}\n");
  return 0;
}

}  // namespace flashmla::tests
