// How a decode step is divided among the SM parts. Pure integer arithmetic, the same on the device,
// in host tests and in jax_flashmla/schedule.py.
//
// Requests stand in a row; each costs its pages plus a fixed amount. The row is cut into
// num_sm_parts pieces of equal cost; a little more than equal if that makes fewer pieces. A cut
// inside a request splits it: the pieces become partial results that the combine kernel merges. A
// cut in a request's fixed cost falls before its first page.
#pragma once

#include "../host_device.h"
#include "../params.h"

namespace flashmla::schedule {

inline constexpr int kRequestCost = 2;  // fixed cost of a request, in pages
inline constexpr int kMinShare = 2;     // least cost worth a part of its own
inline constexpr int kShareCandidates = 9;
inline constexpr int kPieceCost = 3;  // what a piece, whole or split, costs its part, in pages
inline constexpr int kMergeCost = 6;  // what merging splits costs a step, in pages
inline constexpr int kMaxCandidateBatch = 1024;  // beyond it the least share is taken
inline constexpr int kMaxInt = 0x7FFFFFFF;

FLASHMLA_HOST_DEVICE constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Pages of a request, bounded so that the costs of a whole batch fit an int.
FLASHMLA_HOST_DEVICE constexpr int scheduled_pages(int length, int batch) {
  const int cap = (kMaxInt - kShareCandidates) / batch - kRequestCost;
  const int pages = length > 0 ? ceil_div(length, kPageSize) : 0;
  return pages < cap ? pages : cap;
}

// The least cost that each part must take. Up to kShareCandidates - 1 more may be better, if it
// cuts the batch into fewer pieces or spares the merge: choose_share weighs that.
FLASHMLA_HOST_DEVICE constexpr int least_share(int total_cost, int num_sm_parts) {
  const int share = ceil_div(total_cost, num_sm_parts);
  return share > kMinShare ? share : kMinShare;
}

// Where a part begins: the page of the request and how many cuts that request had before.
struct Cut {
  int request;
  int page;
  int split;
};

// Whether part `part` begins behind the last request (0 < part: part 0 never does unless batch =
// 0).
FLASHMLA_HOST_DEVICE constexpr bool behind_the_end(int part, int share, int total_cost) {
  return part > (total_cost - 1) / share;  // part * share >= total_cost without overflow
}

// The cut at part * share, inside `request` whose cost begins at `cost_before`.
FLASHMLA_HOST_DEVICE constexpr Cut cut_inside(int part, int share, int request, int cost_before) {
  const int first_page_cost = cost_before + kRequestCost;
  const int page = part * share - first_page_cost;
  if (page <= 0) return {request, 0, 0};
  return {request, page, part - first_page_cost / share};
}

// Splits of a request whose cost is the interval [cost_before, cost_after).
FLASHMLA_HOST_DEVICE constexpr int split_count(int cost_before, int cost_after, int share) {
  const int cuts = (cost_after - 1) / share - (cost_before + kRequestCost) / share;
  return 1 + (cuts > 0 ? cuts : 0);
}

// The candidate least_share + c whose cost is least, given into how many pieces each cuts the
// batch. Costs are summed over the parts; the first of equal ones is taken.
FLASHMLA_HOST_DEVICE constexpr int choose_share(int least_share, const int* pieces, int batch,
                                                int num_sm_parts) {
  int best = 0;
  long long best_cost = 0;
  for (int c = 0; c < kShareCandidates; ++c) {
    const long long merge = pieces[c] > batch ? kMergeCost : 0;
    const long long cost =
        (c + merge) * num_sm_parts + static_cast<long long>(kPieceCost) * pieces[c];
    if (c == 0 || cost < best_cost) {
      best = c;
      best_cost = cost;
    }
  }
  return least_share + best;
}

// Workspace slot of split `split` of `request`: requests that are not split use none, so
// 2 * num_sm_parts slots are enough whatever the batch.
FLASHMLA_HOST_DEVICE constexpr int split_slot(int splits_before, int request, int split) {
  return 2 * (splits_before - request) + split;
}

}  // namespace flashmla::schedule
