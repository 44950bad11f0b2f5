// The schedule's definition run serially: the same functions that the device kernel calls.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "../schedule/plan.h"
#include "host_programs.h"

namespace flashmla::tests {
namespace {

using namespace schedule;

struct Costs {
  std::vector<int> before;  // [batch + 1]: where each request begins, then the total
  int batch() const { return static_cast<int>(before.size()) - 1; }
  int total() const { return before.back(); }
};

Costs costs_of(const std::vector<int>& lengths) {
  Costs costs = {{0}};
  const int batch = static_cast<int>(lengths.size());
  for (const int length : lengths) {
    costs.before.push_back(costs.total() + kRequestCost + scheduled_pages(length, batch));
  }
  return costs;
}

int share_of(const Costs& costs, int num_sm_parts) {
  const int least = least_share(costs.total(), num_sm_parts);
  if (costs.batch() > kMaxCandidateBatch) return least;
  int pieces[kShareCandidates] = {};
  for (int r = 0; r < costs.batch(); ++r) {
    for (int c = 0; c < kShareCandidates; ++c) {
      pieces[c] += split_count(costs.before[r], costs.before[r + 1], least + c);
    }
  }
  return choose_share(least, pieces, costs.batch(), num_sm_parts);
}

Cut cut_of(const Costs& costs, int share, int num_sm_parts, int part) {
  if (part >= num_sm_parts || behind_the_end(part, share, costs.total())) {
    return {costs.batch(), 0, 0};
  }
  int request = 0;
  while (costs.before[request + 1] <= part * share) ++request;
  return cut_inside(part, share, request, costs.before[request]);
}

// Prints the metadata's five columns part by part, then num_splits.
void print_schedule(int num_sm_parts, const std::vector<int>& lengths) {
  const Costs costs = costs_of(lengths);
  const int share = share_of(costs, num_sm_parts);
  for (int part = 0; part < num_sm_parts; ++part) {
    const Cut begin = cut_of(costs, share, num_sm_parts, part);
    const Cut end = cut_of(costs, share, num_sm_parts, part + 1);
    std::printf("%d %d %d %d %d ", begin.request, begin.page, end.request, end.page, begin.split);
  }
  int splits = 0;
  std::printf("0");
  for (int r = 0; r < costs.batch(); ++r) {
    splits += split_count(costs.before[r], costs.before[r + 1], share);
    std::printf(" %d", splits);
  }
  std::printf("\n");
}

}  // namespace

int plan_schedules() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    int num_sm_parts = 0;
    int batch = 0;
    words >> num_sm_parts >> batch;
    std::vector<int> lengths(static_cast<size_t>(batch));
    for (int& length : lengths) words >> length;
    if (!words) return 1;
    print_schedule(num_sm_parts, lengths);
  }
  return 0;
}

}  // namespace flashmla::tests
