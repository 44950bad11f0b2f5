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

// Where each request begins if they stand apart, then the parts of all.
inline std::vector<int> serial_line_apart(const std::vector<int>& line, Divider share) {
  std::vector<int> parts = {0};
  for (size_t r = 0; r + 1 < line.size(); ++r) {
    parts.push_back(parts.back() + parts_apart(line[r], line[r + 1], share));
  }
  return parts;
}

// The cheapest way to cut the batch. Replaces the line by the one that it cuts.
inline Cutting serial_cutting(std::vector<int>& line, int num_sm_parts) {
  const int batch = static_cast<int>(line.size()) - 1;
  const int least = least_share(line.back(), make_divider(num_sm_parts));
  Cutting best = in_a_row(make_divider(least));
  if (batch > kMaxCandidateBatch) return best;
  const std::vector<int> row = line;
  int best_cost = kMaxInt;
  for (int c = 0; c < kShareCandidates; ++c) {
    const Divider share = make_divider(least + c);
    const int pages = least_apart(least) + c;
    const std::vector<int> alone = serial_line_apart(row, make_divider(pages));
    int pieces = 0;
    bool twice = false;
    bool twice_apart = false;
    for (int r = 0; r < batch; ++r) {
      const int splits = 1 + cuts_inside(row[r], row[r + 1], in_a_row(share));
      pieces += splits;
      twice = twice || merges_twice(splits);
      twice_apart = twice_apart || merges_twice(alone[r + 1] - alone[r]);
    }
    const int cost_apart =
        candidate_cost(pages - least, alone.back(), batch, twice_apart, num_sm_parts);
    const int cost = candidate_cost(c, pieces, batch, twice, num_sm_parts);
    if (alone.back() <= num_sm_parts && cost_apart < best_cost) {
      best = apart(pages);
      best_cost = cost_apart;
      line = alone;
    }
    if (cost < best_cost) {
      best = in_a_row(share);
      best_cost = cost;
      line = row;
    }
  }
  return best;
}

inline Cut serial_cut(const std::vector<int>& line, const Cutting& cutting, int part) {
  const int batch = static_cast<int>(line.size()) - 1;
  if (behind_the_end(part, cutting, line.back())) return {batch, 0, 0};
  const auto next = std::upper_bound(line.begin(), line.end(), part * cutting.share.divisor);
  const int request = static_cast<int>(next - line.begin()) - 1;
  return cut_inside(part, cutting, request, line[request]);
}

inline Schedule serial_schedule(const std::vector<int>& lengths, int num_sm_parts) {
  std::vector<int> line = serial_line(lengths);
  const Cutting cutting = serial_cutting(line, num_sm_parts);
  Schedule schedule = {{}, {0}};
  for (int part = 0; part < num_sm_parts; ++part) {
    const Cut begin = serial_cut(line, cutting, part);
    const Cut end = serial_cut(line, cutting, part + 1);
    for (const int x : {begin.request, begin.page, end.request, end.page, begin.split, 0, 0, 0}) {
      schedule.metadata.push_back(x);
    }
  }
  for (size_t r = 0; r < lengths.size(); ++r) {
    schedule.num_splits.push_back(schedule.num_splits.back() + 1 +
                                  cuts_inside(line[r], line[r + 1], cutting));
  }
  return schedule;
}

}  // namespace flashmla::schedule
