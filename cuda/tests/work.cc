// Work items under right, stale and garbage metadata.
#include "../decode/work.h"

#include <array>
#include <cstdio>
#include <random>

#include "host_programs.h"

namespace flashmla::tests {
namespace {

using namespace decode;

constexpr bool same(const WorkItem& item, int length, int begin_page, int end_page) {
  return item.length == length && item.begin_page == begin_page && item.end_page == end_page;
}
constexpr PartRange kPart = {1, 2, 3, 4, 1};  // from page 2 of request 1 to page 4 of request 3
static_assert(!in_part(kPart, 3, 3) && in_part(kPart, 4, 3) && !in_part(kPart, 9, 4));
static_assert(!in_part({0, 0, 2, 0, 0}, 9, 2));  // the end request without a page is not done
static_assert(same(make_item(kPart, 1, 1000, 1 << 20), 1000, 2, 16));
static_assert(same(make_item(kPart, 2, 65, 1 << 20), 65, 0, 2));
static_assert(same(make_item(kPart, 3, 1000, 1 << 20), 1000, 0, 4));
static_assert(same(make_item(kPart, 3, 130, 1 << 20), 130, 0, 3));  // shorter than planned
static_assert(same(make_item(kPart, 1, 64, 1 << 20), 64, 1, 1));    // begins behind its end
static_assert(same(make_item(kPart, 2, -7, 1 << 20), 0, 0, 0));
static_assert(same(make_item(kPart, 2, schedule::kMaxInt, 128), 128, 0, 2));  // a table of 2 pages
static_assert(kWhole < 0 && kNowhere < 0 && kWhole != kNowhere);              // neither is a slot
static_assert(visible_keys(10, 0, 3, true) == 8 && visible_keys(10, 2, 3, true) == 10);
static_assert(visible_keys(1, 0, 3, true) == -1 && visible_keys(1, 0, 3, false) == 1);

class Garbage {
 public:
  int operator()() {
    constexpr int kOdd[] = {0, 1, -1, 2, 63, 64, 65, schedule::kMaxInt, -schedule::kMaxInt - 1};
    switch (random_() % 3) {
      case 0:
        return kOdd[random_() % std::size(kOdd)];
      case 1:
        return static_cast<int>(random_() % 40);
      default:
        return static_cast<int>(random_());
    }
  }
  int below(int end) { return static_cast<int>(random_() % static_cast<unsigned>(end)); }

 private:
  std::mt19937 random_{7};
};

bool stays_inside(Garbage& garbage) {
  std::array<int, kScheduleColumns> row;
  for (int& column : row) column = garbage();
  const int batch = 1 + garbage.below(20);
  const int table_width = garbage.below(30);
  const PartRange part = read_part(row.data(), batch);
  int items = 0;
  for (int request = part.begin_request; in_part(part, batch, request); ++request, ++items) {
    const WorkItem item = make_item(part, request, garbage(), table_width * kPageSize);
    const bool inside = request >= 0 && request < batch && items < batch && item.length >= 0 &&
                        item.begin_page >= 0 && item.begin_page <= item.end_page &&
                        item.end_page <= table_width &&
                        (item.end_page - 1) * kPageSize < item.length;
    if (!inside) {
      std::printf("row %d %d %d %d, batch %d, table %d: request %d, length %d, pages %d to %d\n",
                  row[0], row[1], row[2], row[3], batch, table_width, request, item.length,
                  item.begin_page, item.end_page);
      return false;
    }
  }
  return true;
}

}  // namespace

int check_work_items() {
  Garbage garbage;
  for (int i = 0; i < 200000; ++i) {
    if (!stays_inside(garbage)) return 1;
  }
  return 0;
}

}  // namespace flashmla::tests
