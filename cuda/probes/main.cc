// The kernels' building blocks one by one on the GPU, each in a process of its own.
//
//   flashmla_probes list    the names
//   flashmla_probes NAME    prints the first differences, then ok or FAIL; exit status 1 on FAIL
#include <cstdio>
#include <cstring>

#include "probe.h"

namespace {

using namespace flashmla::probes;

constexpr struct {
  const char* name;
  const char* what;
  bool (*run)();
} kProbes[] = {
    {"boxes", "TMA: the tiles of a page, and zeros for a page outside the pool", probe_boxes},
    {"one_hot", "scores of one-hot queries: which key column lands where", probe_one_hot},
    {"walk", "scores of a full page over all 576 columns", probe_walk},
    {"values", "P V with V as the transposed operand, P in registers and in memory", probe_values},
    {"weights", "P from registers and P from shared memory give the same bits", probe_weights},
    {"ring", "the page ring over many pages and requests", probe_ring},
    {"named_barriers", "the meeting of a half's four warps", probe_named_barriers},
    {"combine", "the merge of 2 to 200 splits, some of them empty", probe_combine},
    {"schedule", "the schedule of random batches, against the serial one", probe_schedule},
    {"exchange", "2 to 16 devices, played by streams, that exchange and merge", probe_exchange},
};

}  // namespace

int main(int count, char** words) {
  const char* const wanted = count == 2 ? words[1] : "";
  const bool list = std::strcmp(wanted, "list") == 0;
  for (const auto& probe : kProbes) {
    if (list) std::printf("%-16s%s\n", probe.name, probe.what);
    if (std::strcmp(wanted, probe.name) != 0) continue;
    const bool ok = probe.run();
    std::printf("%s %s\n", ok ? "ok" : "FAIL", probe.name);
    return ok ? 0 : 1;
  }
  if (list) return 0;
  std::fprintf(stderr, "usage: flashmla_probes list | NAME\n");
  return 2;
}
