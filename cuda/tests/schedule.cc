// The schedule run serially, and the division that it is made of.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "../schedule/serial.h"
#include "host_programs.h"

namespace flashmla::tests {
namespace {

using namespace schedule;

// The quotients around a multiple of the divisor, where rounding would show first.
bool divides(int divisor, long long multiple) {
  const Divider divider = make_divider(divisor);
  for (long long number = multiple - 2; number <= multiple + 2; ++number) {
    if (number < 0 || number > kMaxInt) continue;
    const int quotient = divider.quotient(static_cast<int>(number));
    if (quotient == number / divisor) continue;
    std::printf("%lld / %d: got %d\n", number, divisor, quotient);
    return false;
  }
  return true;
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
    const Schedule schedule = serial_schedule(lengths, num_sm_parts);
    for (const int x : schedule.metadata) std::printf("%d ", x);
    for (const int x : schedule.num_splits) std::printf("%d ", x);
    std::printf("\n");
  }
  return 0;
}

// Every divisor up to 5000, every power of two and its neighbours, every 9973rd number; of each the
// first multiples, the last ones and some between.
int check_divisions() {
  std::vector<int> divisors;
  for (int d = 1; d <= 5000; ++d) divisors.push_back(d);
  for (long long power = 1; power <= 1ll << 31; power *= 2) {
    for (long long d = power - 2; d <= power + 2; ++d) {
      if (1 <= d && d <= kMaxInt) divisors.push_back(static_cast<int>(d));
    }
  }
  for (long long d = 1; d <= kMaxInt; d += 9973) divisors.push_back(static_cast<int>(d));
  for (const int divisor : divisors) {
    const long long last = kMaxInt / divisor;
    for (const long long factor : {0ll, 1ll, 2ll, last / 3, last / 2, last - 1, last, last + 1}) {
      if (!divides(divisor, factor * divisor)) return 1;
    }
    if (!divides(divisor, kMaxInt)) return 1;
  }
  return 0;
}

}  // namespace flashmla::tests
