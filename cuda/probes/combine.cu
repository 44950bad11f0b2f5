// The merge: request 1 of 3 is split n ways, its neighbours are whole and must stay untouched.
#include <algorithm>
#include <limits>

#include "../combine/kernel.cuh"
#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

constexpr int kBatch = 3;
constexpr int kSplit = 1;  // the request that is split
constexpr int kQueries = 2;
constexpr int kHeadsKv = 2;
constexpr int kHeadsQ = 6;
constexpr int kRows = kQueries * kHeadsQ / kHeadsKv;  // per KV head
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float fraction(size_t i) { return static_cast<float>(i * 2654435761u % 65536) / 65536.f; }

// Partial results of all slots [2 * parts, h_kv, rows]; those of no split stay NaN.
struct Partials {
  std::vector<uint16_t> out;  // float16
  std::vector<PartialRow> rows;

  double value(size_t row, int column) const {
    return rows[row].scale[column / 256] * runner::to_float(out[row * kHeadDimV + column], true);
  }
};

// Every third split is empty, and in row 0 all are.
Partials make_partials(int splits) {
  const size_t rows = static_cast<size_t>(2 * splits) * kHeadsKv * kRows;
  Partials partials = {std::vector<uint16_t>(rows * kHeadDimV, 0xFFFF),
                       std::vector<PartialRow>(rows, {NAN, {NAN, NAN}, NAN})};
  for (size_t i = 0; i < static_cast<size_t>(splits) * kHeadsKv * kRows; ++i) {
    const size_t row = i % (kHeadsKv * kRows), split = i / (kHeadsKv * kRows);
    const bool empty = row == 0 || (split % 3 == 1 && row % 2 == 1);
    partials.rows[i].lse = empty ? -kInfinity : 60.f * fraction(i * 3) - 30.f;
    partials.rows[i].scale[0] = std::ldexp(1.f, -static_cast<int>(i % 5));
    partials.rows[i].scale[1] = std::ldexp(1.f, static_cast<int>(i % 3));
    for (size_t c = 0; c < kHeadDimV; ++c) {
      const float value = empty ? 0.f : fraction(i * kHeadDimV + c) - 0.5f;
      partials.out[i * kHeadDimV + c] = runner::from_float(value, true);
    }
  }
  return partials;
}

// Where a split's row has a column if its columns are as fragments have them.
int fragment_place(int column) {
  const int block = column % 32 / 8, lane = column % 8 / 2;
  return column / 32 * 32 + lane * 8 + block * 2 + column % 2;
}

// One row by hand; returns its lse.
double merge(const Partials& partials, int splits, bool in_order, int row,
             std::vector<double>& out) {
  const auto place = [&](int k) { return static_cast<size_t>(k) * kHeadsKv * kRows + row; };
  double most = -kInfinity, sum = 0;
  for (int k = 0; k < splits; ++k) most = std::max<double>(most, partials.rows[place(k)].lse);
  out.assign(kHeadDimV, 0.0);
  if (most == -kInfinity) return most;
  for (int k = 0; k < splits; ++k) {
    const double weight = std::exp(partials.rows[place(k)].lse - most);
    sum += weight;
    for (int c = 0; c < kHeadDimV; ++c) {
      out[c] += weight * partials.value(place(k), in_order ? c : fragment_place(c));
    }
  }
  for (double& x : out) x /= sum;
  return most + std::log(sum);
}

template <class T, int kMostRows>
void compare(Mismatches& mismatches, int splits) {
  constexpr bool in_order = combine::Blocks<kMostRows>::kFew;
  constexpr bool kFp16 = kElementType<T> == ElementType::kFloat16;
  const Partials partials = make_partials(splits);
  std::vector<int> metadata(static_cast<size_t>(splits) * kScheduleColumns);
  for (int part = 0; part < splits; ++part) {  // part 0 begins with request 0
    const int row[] = {part == 0 ? 0 : kSplit, part, kSplit, part + 1, part};
    std::copy(std::begin(row), std::end(row), metadata.begin() + part * kScheduleColumns);
  }
  constexpr size_t kVectors = static_cast<size_t>(kBatch) * kQueries * kHeadsQ;
  const DeviceArray<int> device_metadata(metadata), num_splits({0, 1, 1 + splits, 2 + splits});
  DeviceArray<uint16_t> partial_out(partials.out);
  DeviceArray<PartialRow> partial_rows(partials.rows);
  DeviceArray<float> lse(kVectors);
  DeviceArray<uint16_t> out(kVectors * kHeadDimV);
  lse.poison();
  out.poison();
  Arguments a = {};
  a.params.tile_scheduler_metadata = device_metadata.get();
  a.params.num_splits = num_splits.get();
  a.params.out = out.get();
  a.params.lse = lse.get();
  a.params.partial_out = partial_out.get();
  a.params.partial_rows = partial_rows.get();
  a.params.batch = kBatch;
  a.params.s_q = kQueries;
  a.params.h_q = kHeadsQ;
  a.params.h_kv = kHeadsKv;
  a.params.num_sm_parts = splits;
  decode::set_rows(a, kRows, kHeadsQ / kHeadsKv);
  a.few = in_order;
  using Blocks = combine::Blocks<kMostRows>;
  constexpr int blocks = Blocks::per_tile(kHeadsKv) * kHeadsKv;
  combine::combine_kernel<T, kMostRows><<<blocks * splits, Blocks::kThreads>>>(a, blocks);
  mismatches.synchronize("combine_kernel");
  const std::vector<uint16_t> got = out.host();
  const std::vector<float> got_lse = lse.host();
  std::vector<double> expected;
  for (int vector = 0; vector < static_cast<int>(kVectors); ++vector) {
    const int query = vector / kHeadsQ % kQueries, head = vector % kHeadsQ;
    if (vector / (kQueries * kHeadsQ) != kSplit) {
      mismatches.expect(got[vector * kHeadDimV], 0xFFFF, 0, "untouched out", vector, 0);
      mismatches.expect(std::isnan(got_lse[vector]), 1, 0, "untouched lse", vector, 0);
      continue;
    }
    const int packed = query * a.heads_per_kv + head % a.heads_per_kv;
    const int row = head / a.heads_per_kv * kRows + packed;
    const double expected_lse = merge(partials, splits, in_order, row, expected);
    mismatches.expect(got_lse[vector], expected_lse, 2e-5, "lse of [splits][row]", splits, row);
    for (int c = 0; c < kHeadDimV; ++c) {
      const double tolerance = 2e-5 + std::fabs(expected[c]) * (kFp16 ? 1e-3 : 8e-3);
      mismatches.expect(runner::to_float(got[vector * kHeadDimV + c], kFp16), expected[c],
                        tolerance, "out of [row][column]", row, c);
    }
  }
}

}  // namespace

bool probe_combine() {
  Mismatches mismatches;
  for (int splits = 2; splits <= 200; splits += splits < 35 ? 1 : 33) {
    compare<__nv_bfloat16, 16>(mismatches, splits);
    compare<__half, 32>(mismatches, splits);
    compare<__nv_bfloat16, 64>(mismatches, splits);
    compare<__half, 64>(mismatches, splits);
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
