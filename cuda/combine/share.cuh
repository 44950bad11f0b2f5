// Who merges what. The rows of a split request are shared out equally among the parts that begin
// with a piece of it: all of its parts, but perhaps the first, which may have begun with another
// request. So no part has more than one share.
#pragma once

#include "../decode/arguments.h"

namespace flashmla::combine {

// A line is 64 columns of a packed row. All rows of all KV heads follow one another, in a split as
// in a request's output.
inline constexpr int kLineColumns = 64;
inline constexpr int kRowLines = kHeadDimV / kLineColumns;

struct Share {
  int request = 0;
  int first_slot = 0;
  int splits = 0;
  int begin_line = 0;
  int end_line = 0;   // == begin_line: nothing to merge
  bool idle = false;  // the part has nothing to do at all

  __device__ __forceinline__ bool empty() const { return begin_line >= end_line; }
};

// Where share `index` of `shares` equal ones begins.
__device__ __forceinline__ int share_edge(int count, int index, int shares) {
  const int each = count / shares;
  return each * index + min(index, count - each * shares);
}

// `lines`: of a request. Neither a stale schedule nor one of another batch leads outside of arrays.
__device__ __forceinline__ Share find_share(const decode::Arguments& a, int part, int lines) {
  const DecodeParams& p = a.params;
  const decode::PartRange range = decode::read_part(a, part);
  const int request = range.begin_request;
  const int split = range.begin_split;
  const bool whole = split == 0 && range.end_request > request;
  if (request >= p.batch) return {.idle = true};
  if (whole || split < 0 || split > part) return {};
  const decode::PartRange first = decode::read_part(a, part - split);
  const int before = p.num_splits[request];
  const int splits = p.num_splits[request + 1] - before;
  const int first_slot = schedule::split_slot(before, request, 0);
  const bool fits = first_slot >= 0 && splits <= 2 * p.num_sm_parts - first_slot;
  if (splits <= 1 || split >= splits || !fits) return {};
  const int left_out = first.begin_request == request && first.begin_page <= 0 ? 0 : 1;
  const int shares = splits - left_out;
  const int index = split - left_out;
  if (index < 0) return {};
  return {request, first_slot, splits, share_edge(lines, index, shares),
          share_edge(lines, index + 1, shares)};
}

}  // namespace flashmla::combine
