// The named barriers of the two halves: both at work at once, each lets its own four warps meet.
#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

constexpr int kRounds = 1000;
constexpr int kThreads = 2 * decode::kWarpgroup;

__global__ void __launch_bounds__(kThreads) meet_kernel(int* wrong_rounds) {
  __shared__ volatile int seen[2][decode::kWarpgroup];
  const int half = static_cast<int>(threadIdx.x) / decode::kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % decode::kWarpgroup;
  const int warp = thread / 32;
  int wrong = 0;
  for (int round = 0; round < kRounds; ++round) {
    if ((round + warp) % 5 == half) __nanosleep(static_cast<unsigned>(round * 13 % 200));
    seen[half][thread] = round;
    sm90::named_barrier_sync(decode::kOwnWarps + half, decode::kWarpgroup);
    wrong += seen[half][(thread + 32) % decode::kWarpgroup] != round;
    wrong += seen[half][(thread + 97) % decode::kWarpgroup] != round;
    sm90::named_barrier_sync(decode::kOwnWarps + half, decode::kWarpgroup);
  }
  wrong_rounds[threadIdx.x] = wrong;
}

}  // namespace

bool probe_named_barriers() {
  Mismatches mismatches;
  DeviceArray<int> wrong(kThreads);
  wrong.poison();
  meet_kernel<<<1, kThreads>>>(wrong.get());
  mismatches.synchronize("meet_kernel");
  const std::vector<int> got = wrong.host();
  for (int i = 0; i < kThreads; ++i) {
    mismatches.expect(got[i], 0, 0, "missed meetings of [half][thread]", i / decode::kWarpgroup,
                      i % decode::kWarpgroup);
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
