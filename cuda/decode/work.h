// What a block has to do: the items (request, pages) of its part of the schedule.
//
// Every role walks the same items. Whatever the metadata holds, an item names a request of the
// batch and pages inside that request's length and table row, so a stale schedule can give wrong
// numbers but no stray access.
#pragma once

#include "../host_device.h"
#include "../params.h"
#include "../schedule/plan.h"

namespace flashmla::decode {

struct PartRange {
  int begin_request;
  int begin_page;
  int end_request;
  int end_page;
  int begin_split;
};

struct WorkItem {
  int request;
  int length;      // keys of the request
  int begin_page;  // [begin_page, end_page) of the request's table row
  int end_page;
};

// Where an item's rows go: its workspace slot, or one of these.
inline constexpr int kWhole = -1;    // not split: to `out`
inline constexpr int kNowhere = -2;  // the schedule was made for something else

struct Assignment {
  WorkItem item;
  int destination;
};

FLASHMLA_HOST_DEVICE constexpr int clamped(int value, int low, int high) {
  return value < low ? low : (value > high ? high : value);
}

// The part's row of tile_scheduler_metadata.
FLASHMLA_HOST_DEVICE PartRange read_part(const int* row, int batch) {
  return {clamped(row[0], 0, batch), row[1], clamped(row[2], 0, batch), row[3], row[4]};
}

FLASHMLA_HOST_DEVICE constexpr bool in_part(const PartRange& part, int batch, int request) {
  return request < batch &&
         (request < part.end_request || (request == part.end_request && part.end_page > 0));
}

FLASHMLA_HOST_DEVICE constexpr WorkItem make_item(const PartRange& part, int request,
                                                  int cache_seqlen, int max_length) {
  const int length = clamped(cache_seqlen, 0, max_length);
  const int pages = schedule::ceil_div(length, kPageSize);
  const int end = request == part.end_request ? clamped(part.end_page, 0, pages) : pages;
  const int begin = request == part.begin_request ? clamped(part.begin_page, 0, end) : 0;
  return {request, length, begin, end};
}

// Keys that query `query` of s_q sees: bottom-right aligned causal mask.
FLASHMLA_HOST_DEVICE constexpr int visible_keys(int length, int query, int s_q, bool causal) {
  return causal ? length - (s_q - 1 - query) : length;
}

}  // namespace flashmla::decode
