// The host programs: main.cc says what each does.
#pragma once

namespace flashmla::tests {

int print_constants();
int print_few_constants();
int plan_schedules();
int check_divisions();
int check_work_items();

}  // namespace flashmla::tests
