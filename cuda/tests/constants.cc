// What tests/barrier_layout.py and tests/few_rows_layout.py have to agree with.
#include <cstdio>
#include <utility>

#include "../decode/storage.h"
#include "../decode_few/storage.h"
#include "host_programs.h"

namespace flashmla::tests {
namespace {

struct Constant {
  const char* name;
  long long value;
};

template <int kCount>
int print_json(const Constant (&constants)[kCount]) {
  const char* before = "{";
  for (const Constant& constant : constants) {
    std::printf("%s\"%s\": %lld", before, constant.name, constant.value);
    before = ", ";
  }
  std::printf("}\n");
  return 0;
}

// Elements of an array's outermost dimension.
template <class Array>
constexpr long long length_of = sizeof(Array) / sizeof(std::declval<Array>()[0]);

}  // namespace

int print_constants() {
  using namespace decode;
  const Constant constants[] = {
      {"page_slots", kPageSlots},
      {"page_parts", kPageParts},
      {"page_boxes", kPageBoxes},
      {"latent_box_bytes", bytes_of(box_tiles(0))},
      {"rope_box_bytes", bytes_of(box_tiles(kPageBoxes - 1))},
      {"query_bytes", sizeof(Storage::query)},
      {"warps_per_half", kWarpsPerWarpgroup},
      {"query_loader_warps", kQueryLoaderWarps},
      {"page_full_arrivals", kPageFullArrivals},
      {"page_empty_arrivals", kPageEmptyArrivals},
      {"query_full_arrivals", kQueryFullArrivals},
      {"query_empty_arrivals", kQueryEmptyArrivals},
      {"weights_ready_arrivals", kWeightsReadyArrivals},
      {"odd_scored_arrivals", kOddScoredArrivals},
      {"sums_ready_arrivals", kSumsReadyArrivals},
      {"row_sum_buffers", sizeof(Storage::row_sum) / (2 * kRowTile * sizeof(float))},
      {"assignment_buffers", sizeof(Storage::assignments) / sizeof(Assignment)},
      {"barrier_count", sizeof(Barriers) / sizeof(uint64_t)},
  };
  return print_json(constants);
}

int print_few_constants() {
  using namespace decode_few;
  using Small = SmallStorage<16, Storage<16>::kSlots>;
  const Constant constants[] = {
      {"slots_8", Storage<8>::kSlots},
      {"slots_16", Storage<16>::kSlots},
      {"slots_24", Storage<24>::kSlots},
      {"slots_32", Storage<32>::kSlots},
      {"page_parts", kPageParts},
      {"part_bytes", kPartBytes},
      {"weight_slots", kWeightSlots},
      {"score_warps", kWarpsPerWarpgroup},
      {"value_warps", kValueWarps},
      {"first_known_arrivals", kFirstKnownArrivals},
      {"part_full_arrivals", kPartFullArrivals},
      {"part_empty_arrivals", kPartEmptyArrivals},
      {"query_full_arrivals", kQueryFullArrivals},
      {"query_empty_arrivals", kQueryEmptyArrivals},
      {"weights_ready_arrivals", kWeightsReadyArrivals},
      {"sums_ready_arrivals", kSumsReadyArrivals},
      {"page_max_buffers", length_of<decltype(Small::page_max)>},
      {"row_sum_buffers", length_of<decltype(Small::row_sum)>},
      {"query_buffers", length_of<decltype(Storage<16>::query)>},
      {"assignment_buffers", length_of<decltype(Small::assignments)>},
      {"barrier_count", sizeof(Small::barriers) / sizeof(uint64_t)},
  };
  return print_json(constants);
}

}  // namespace flashmla::tests
