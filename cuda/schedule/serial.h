// The schedule run serially on the host, with the functions that the device kernel calls.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace flashmla::schedule {

struct Schedule {
  std::vector<int> metadata;    // [num_sm_parts, kScheduleColumns]
  std::vector<int> num_splits;  // [batch + 1]
};

// Where each request begins on the line of cost, then the total: [batch + 1].
inline std::vector<int> serial_line(const std::vector<int>& lengths) {
  const int cap = page_cap(static_cast<int>(lengths.size()));
  std::vector<int> line = {0};
  for (const int length : lengths) line.push_back(line.back() + request_cost(length, cap));
  return line;
}

inline Divider serial_share(const std::vector<int>& line, int num_sm_parts) {
  const int batch = static_cast<int>(line.size()) - 1;
  const int least = least_share(line.back(), make_divider(num_sm_parts));
  if (batch > kMaxCandidateBatch) return make_divider(least);
  int best = 0;
  int best_cost = kMaxInt;
  for (int c = 0; c < kShareCandidates; ++c) {
    const Divider share = make_divider(least + c);
    int pieces = batch;
    for (int r = 0; r < batch; ++r) pieces += cuts_inside(line[r], line[r + 1], share);
    const int cost = candidate_cost(c, pieces, batch, num_sm_parts);
    if (cost < best_cost) {
      best = c;
      best_cost = cost;
    }
  }
  return make_divider(least + best);
}

inline Cut serial_cut(const std::vector<int>& line, Divider share, int part) {
  const int batch = static_cast<int>(line.size()) - 1;
  if (behind_the_end(part, share, line.back())) return {batch, 0, 0};
  const auto next = std::upper_bound(line.begin(), line.end(), part * share.divisor);
  const int request = static_cast<int>(next - line.begin()) - 1;
  return cut_inside(part, share, request, line[request]);
}

inline Schedule serial_schedule(const std::vector<int>& lengths, int num_sm_parts) {
  const std::vector<int> line = serial_line(lengths);
  const Divider share = serial_share(line, num_sm_parts);
  Schedule schedule = {{}, {0}};
  for (int part = 0; part < num_sm_parts; ++part) {
    const Cut begin = serial_cut(line, share, part);
    const Cut end = serial_cut(line, share, part + 1);
    for (const int x : {begin.request, begin.page, end.request, end.page, begin.split, 0, 0, 0}) {
      schedule.metadata.push_back(x);
    }
  }
  for (size_t r = 0; r < lengths.size(); ++r) {
    schedule.num_splits.push_back(schedule.num_splits.back() + 1 +
                                  cuts_inside(line[r], line[r + 1], share));
  }
  return schedule;
}

}  // namespace flashmla::schedule
