// The device's schedule against the serial one, over batches around the sizes at which the kernel
// takes another number of threads or another chunk, and over lengths that are zero, negative, huge.
#include <algorithm>
#include <random>
#include <string>

#include "../launch.h"
#include "../runner/problem.h"
#include "../schedule/serial.h"
#include "probe.h"

namespace flashmla::probes {
namespace {

using runner::DeviceArray;
using schedule::kMaxInt;

constexpr int kBatches[] = {1,    2,    5,    31,   32,   33,   128,  133,  287,  288,   289,   500,
                            1024, 1025, 1151, 1152, 1153, 4093, 4096, 4097, 8192, 16385, 100003};
constexpr int kParts[] = {1, 2, 7, 33, 132, 264, 289, 1023, 1025, 3000};
constexpr int kLongest[] = {0, 1, 64, 65, 1000, 8192, 131072, kMaxInt};

std::vector<int> random_lengths(std::mt19937& random, int batch, int longest, int kind) {
  std::vector<int> lengths(static_cast<size_t>(batch));
  for (int& length : lengths) {
    const bool rare = random() % 10 == 0;
    const int any = static_cast<int>(random() % (static_cast<unsigned>(longest) + 1));
    if (kind == 0) length = any;
    if (kind == 1) length = longest;
    if (kind == 2) length = rare ? any : 0;
    if (kind == 3) length = rare ? -kMaxInt - 1 : longest / 2;
  }
  return lengths;
}

void compare(Mismatches& mismatches, const std::vector<int>& lengths, int parts, int offset) {
  const int batch = static_cast<int>(lengths.size());
  std::vector<int> moved(static_cast<size_t>(offset), 0);  // off the alignment of four
  moved.insert(moved.end(), lengths.begin(), lengths.end());
  const DeviceArray<int> device_lengths(moved);
  DeviceArray<int> metadata(static_cast<size_t>(parts) * kScheduleColumns);
  DeviceArray<int> num_splits(moved.size() + 1);
  metadata.poison();
  num_splits.poison();
  const char* const error = launch_schedule({.cache_seqlens = device_lengths.get() + offset,
                                             .tile_scheduler_metadata = metadata.get(),
                                             .num_splits = num_splits.get() + offset,
                                             .batch = batch,
                                             .num_sm_parts = parts},
                                            nullptr);
  if (error != nullptr) mismatches.fail("launch_schedule", error);
  mismatches.synchronize("schedule_kernel");
  const schedule::Schedule expected = schedule::serial_schedule(lengths, parts);
  const std::vector<int> got_metadata = metadata.host();
  const std::vector<int> got_splits = num_splits.host();
  const std::string where = " of " + std::to_string(parts) + " parts, batch";
  for (size_t i = 0; i < expected.metadata.size(); ++i) {
    mismatches.expect(got_metadata[i], expected.metadata[i], 0, ("metadata" + where).c_str(), batch,
                      static_cast<int>(i));
  }
  for (int r = 0; r <= batch; ++r) {
    mismatches.expect(got_splits[r + offset], expected.num_splits[r], 0,
                      ("num_splits" + where).c_str(), batch, r);
  }
}

}  // namespace

bool probe_schedule() {
  Mismatches mismatches;
  std::mt19937 random(1);
  int count = 0;
  for (const int batch : kBatches) {
    for (const int longest : kLongest) {
      for (int kind = 0; kind < 4; ++kind, ++count) {
        const int parts = kParts[count % std::size(kParts)];
        const int offset = count % 7 == 0 ? 1 + count % 3 : 0;
        compare(mismatches, random_lengths(random, batch, longest, kind), parts, offset);
      }
    }
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
