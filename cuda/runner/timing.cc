#include "timing.h"

#include <algorithm>
#include <cstdio>

#include "replay.h"
#include "workload.h"

namespace flashmla::runner {

bool time_calls(const Options& o) {
  const Pool pool(o);
  const Workload work(o, pool, o.calls);
  const char* const unscheduled = launch_schedule(work.schedule(), nullptr);
  cudaDeviceSynchronize();
  Replay replay([&](cudaStream_t stream) { return work.launch(launch_decode, stream); });

  replay.run(1);
  const float once = replay.run(1);
  const int replays = std::max(1, static_cast<int>(static_cast<float>(o.replay_ms) / once));
  std::vector<float> us;
  for (int i = 0; i < 7; ++i) {
    us.push_back(replay.run(replays) * 1000.f / static_cast<float>(o.calls * replays));
  }
  if (const char* const error = unscheduled != nullptr ? unscheduled : replay.error()) {
    std::printf("FAIL %s\n", error);
    return false;
  }
  const double t = median(us);
  const double floor_us = std::max(work.bytes() / 4.65e6, work.flop() / 787e6);
  std::printf(
      "time h_q=%d s_q=%d b=%d len=%d parts=%d: %.2f us, %.0f GB/s, %.0f TFLOP/s, floor %.1f, "
      "x%.2f\n",
      o.h_q, o.s_q, o.b, o.lengths[0], work.parts(), t, work.bytes() / t / 1e3,
      work.flop() / t / 1e6, floor_us, t / floor_us);
  return true;
}

}  // namespace flashmla::runner
