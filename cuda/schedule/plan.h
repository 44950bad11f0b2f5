// How a decode step is divided among the SM parts. Pure integer arithmetic, the same on the device,
// in host tests and in jax_flashmla/schedule.py.
//
// Requests stand in a row; each costs its pages plus a fixed amount. The row is cut into
// num_sm_parts pieces of equal cost; a little more than equal if that makes fewer pieces. A cut
// inside a request splits it: the pieces become partial results that the combine kernel merges. A
// cut in a request's fixed cost falls before its first page.
//
// Or requests stand apart: each gets as many parts of its own as it has shares of pages. No part
// then has the end of one and the beginning of another, which is better where parts are enough.
#pragma once

#include "../host_device.h"
#include "../params.h"

namespace flashmla::schedule {

inline constexpr int kRequestCost = 3;  // fixed cost of a request, in pages
inline constexpr int kShareCandidates = 9;
inline constexpr int kPieceCost = 4;      // what a piece, whole or split, costs its part, in pages
inline constexpr int kMergeCost = 3;      // what merging splits costs a step, in pages
inline constexpr int kSmoothSplits = 16;  // up to so many merge equally well, whatever their number
inline constexpr int kMaxCandidateBatch = 1024;  // beyond it: the least share, in a row
inline constexpr int kMaxInt = 0x7FFFFFFF;

FLASHMLA_HOST_DEVICE constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Divides any int >= 0 exactly by a divisor that many numbers share: a multiplication each.
struct Divider {
  int divisor;
  unsigned reciprocal;

  // reciprocal = (2^32 - e) / divisor with 1 <= e <= divisor, so number * reciprocal / 2^32 falls
  // short of number / divisor by at most number / 2^32 < 1: its floor is the quotient or one less.
  FLASHMLA_HOST_DEVICE constexpr int quotient(int number) const {
    const unsigned long long product =
        static_cast<unsigned long long>(static_cast<unsigned>(number)) * reciprocal;
    const int low = static_cast<int>(product >> 32);
    return low + (number - low * divisor >= divisor);
  }
};

FLASHMLA_HOST_DEVICE constexpr Divider make_divider(int divisor) {
  return {divisor, 0xFFFFFFFFu / static_cast<unsigned>(divisor)};
}

// The most pages that a request counts for, so that the costs of a whole batch fit an int.
FLASHMLA_HOST_DEVICE constexpr int page_cap(int batch) {
  return (kMaxInt - kShareCandidates) / batch - kRequestCost;
}

FLASHMLA_HOST_DEVICE constexpr int request_cost(int length, int page_cap) {
  const unsigned tokens = length > 0 ? static_cast<unsigned>(length) : 0;
  const int pages = static_cast<int>((tokens + kPageSize - 1) / kPageSize);
  return kRequestCost + (pages < page_cap ? pages : page_cap);
}

// The least cost that each part must take. Up to kShareCandidates - 1 more may be better, if it
// cuts the batch into fewer pieces or spares the merge: candidate_cost weighs that.
FLASHMLA_HOST_DEVICE constexpr int least_share(int total_cost, Divider num_sm_parts) {
  const int whole = num_sm_parts.quotient(total_cost);
  return whole + (whole * num_sm_parts.divisor != total_cost);
}

// How the batch is cut: requests of known cost stand on a line, and part p begins at p * share.
struct Cutting {
  Divider share;
  int request_cost;  // before a request's first page
  int unit_pages;    // pages per unit of cost
};

FLASHMLA_HOST_DEVICE constexpr Cutting in_a_row(Divider share) { return {share, kRequestCost, 1}; }

// A request's cost is then its parts_apart, a share is one.
FLASHMLA_HOST_DEVICE constexpr Cutting apart(int share) { return {make_divider(1), 0, share}; }

// The pages of a part in the first candidate: its request's fixed cost is in the least share.
FLASHMLA_HOST_DEVICE constexpr int least_apart(int least_share) {
  return least_share > kRequestCost ? least_share - kRequestCost : 1;
}

// Parts of its own that a request takes whose cost in a row is the interval [cost_before,
// cost_after).
FLASHMLA_HOST_DEVICE constexpr int parts_apart(int cost_before, int cost_after, Divider share) {
  const int pages = cost_after - cost_before - kRequestCost;
  return pages > 0 ? share.quotient(pages - 1) + 1 : 1;
}

// Where a part begins: the page of the request and how many cuts that request had before.
struct Cut {
  int request;
  int page;
  int split;
};

// Whether part `part` begins behind the last request (0 < part: part 0 never does unless batch =
// 0).
FLASHMLA_HOST_DEVICE constexpr bool behind_the_end(int part, const Cutting& cutting,
                                                   int total_cost) {
  return part >
         cutting.share.quotient(total_cost - 1);  // part * share >= total_cost without overflow
}

// The cut at part * share, inside `request` whose cost begins at `cost_before`.
FLASHMLA_HOST_DEVICE constexpr Cut cut_inside(int part, const Cutting& cutting, int request,
                                              int cost_before) {
  const int first_page_cost = cost_before + cutting.request_cost;
  const int behind = part * cutting.share.divisor - first_page_cost;
  if (behind <= 0) return {request, 0, 0};
  return {request, behind * cutting.unit_pages, part - cutting.share.quotient(first_page_cost)};
}

// Cuts that fall behind the first page of a request whose cost is the interval [cost_before,
// cost_after): one less than its splits. 0 for the interval [total_cost, total_cost).
FLASHMLA_HOST_DEVICE constexpr int cuts_inside(int cost_before, int cost_after,
                                               const Cutting& cutting) {
  const int cuts = cutting.share.quotient(cost_after - 1) -
                   cutting.share.quotient(cost_before + cutting.request_cost);
  return cuts > 0 ? cuts : 0;
}

// Combine merges more than kSmoothSplits splits in one pass where they are a power of two, else in
// two.
FLASHMLA_HOST_DEVICE constexpr bool merges_twice(int splits) {
  return splits > kSmoothSplits && (splits & (splits - 1)) != 0;
}

// What a candidate costs, summed over the parts, given how much more than the least share its own
// is, into how many pieces it cuts the batch, and whether any request merges twice, which is half a
// page: 128 rows, 1 x 8192 16.5 -> 13.7 us, 64 rows, 1 x 16384 18.6 -> 15.0 (H200). Candidate c is
// a share of least_share + c in a row, or of least_apart + c apart, if those pieces are at most as
// many as parts. The first of the cheapest is taken, of the same c apart. Fits an int up to 2^26
// parts.
FLASHMLA_HOST_DEVICE constexpr int candidate_cost(int more, int pieces, int batch, bool twice,
                                                  int num_sm_parts) {
  const int merge = pieces > batch ? kMergeCost : 0;
  return (more + merge) * num_sm_parts + (twice ? num_sm_parts / 2 : 0) + kPieceCost * pieces;
}

// Workspace slot of split `split` of `request`: requests that are not split use none, so
// 2 * num_sm_parts slots are enough whatever the batch.
FLASHMLA_HOST_DEVICE constexpr int split_slot(int splits_before, int request, int split) {
  return 2 * (splits_before - request) + split;
}

}  // namespace flashmla::schedule
