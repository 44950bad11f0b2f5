// How a decode step is divided among the SM parts. Pure integer arithmetic, the same on the device,
// in host tests and in jax_flashmla/schedule.py.
//
// Requests stand in a row; each costs its pages plus a fixed amount. The row is cut into
// num_sm_parts pieces of equal cost; a little more than equal if that splits no request. A cut
// inside a request splits it: the pieces become partial results that the combine kernel merges. A
// cut in a request's fixed cost falls before its first page.
#pragma once

#include "../host_device.h"
#include "../params.h"

namespace flashmla::schedule {

inline constexpr int kRequestCost = 2;  // fixed cost of a request, in pages
inline constexpr int kMinShare = 2;     // least cost worth a part of its own
inline constexpr int kMergeCost = 8;    // what merging splits costs a step, in pages
inline constexpr int kMaxInt = 0x7FFFFFFF;

FLASHMLA_HOST_DEVICE constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Pages of a request, bounded so that the costs of a whole batch fit an int.
FLASHMLA_HOST_DEVICE constexpr int scheduled_pages(int length, int batch) {
  const int cap = (kMaxInt - kMergeCost) / batch - kRequestCost;
  const int pages = length > 0 ? ceil_div(length, kPageSize) : 0;
  return pages < cap ? pages : cap;
}

// The least cost that each part must take. Up to kMergeCost more is better if then no request is
// split: the smallest such share is taken, else this one.
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

// Bit d: with the share least_share + d this request is split.
FLASHMLA_HOST_DEVICE constexpr unsigned splitting_shares(int cost_before, int cost_after,
                                                         int least_share) {
  unsigned mask = 0;
  for (int d = 0; d <= kMergeCost; ++d) {
    mask |= (split_count(cost_before, cost_after, least_share + d) > 1 ? 1u : 0u) << d;
  }
  return mask;
}

// With no share of the candidates can a request of more cost than this stay whole.
FLASHMLA_HOST_DEVICE constexpr int most_whole_cost(int least_share) {
  return least_share + kMergeCost + kRequestCost;
}

// The share to use, given the splitting_shares of all requests.
FLASHMLA_HOST_DEVICE constexpr int choose_share(int least_share, unsigned splitting) {
  for (int d = 0; d <= kMergeCost; ++d) {
    if ((splitting >> d & 1u) == 0) return least_share + d;
  }
  return least_share;
}

// Workspace slot of split `split` of `request`: requests that are not split use none, so
// 2 * num_sm_parts slots are enough whatever the batch.
FLASHMLA_HOST_DEVICE constexpr int split_slot(int splits_before, int request, int split) {
  return 2 * (splits_before - request) + split;
}

}  // namespace flashmla::schedule
