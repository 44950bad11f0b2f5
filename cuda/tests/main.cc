// Host tests of the code that needs no GPU; any C++20 compiler builds them.
//
//   host_tests constants   the constants of the barrier protocol as JSON
//   host_tests few         the same of the kernel for few rows
//   host_tests divisions   the schedule's division by multiplication is exact
//   host_tests schedule    reads lines "num_sm_parts batch length…", prints a line per schedule
//   host_tests work        work items stay inside the batch and the table, whatever the metadata
#include <cstdio>
#include <cstring>

#include "host_programs.h"

int main(int count, char** words) {
  using namespace flashmla::tests;
  const char* const name = count == 2 ? words[1] : "";
  if (std::strcmp(name, "constants") == 0) return print_constants();
  if (std::strcmp(name, "few") == 0) return print_few_constants();
  if (std::strcmp(name, "divisions") == 0) return check_divisions();
  if (std::strcmp(name, "schedule") == 0) return plan_schedules();
  if (std::strcmp(name, "work") == 0) return check_work_items();
  std::fprintf(stderr, "usage: host_tests constants | few | divisions | schedule | work\n");
  return 2;
}
