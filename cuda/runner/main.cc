// The decode step without XLA: checks one case against float64, or times it.
//
//   flashmla_runner b=4 h_q=128 len=1000,64,0,77 s_q=2      check (exit status 1 on a mismatch)
//   flashmla_runner b=128 h_q=128 len=4096 calls=20         time
//   flashmla_runner ceiling=1                               how fast memory can be read
//
// Options: options.h. compute-sanitizer runs this program because it misses overruns inside a
// framework's memory pool.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "ceiling.h"
#include "problem.h"
#include "timing.h"

namespace flashmla::runner {
namespace {

bool failed(const char* what, const char* error) {
  if (error != nullptr) std::printf("FAIL %s: %s\n", what, error);
  return error != nullptr;
}

bool synchronize(const char* what) {
  const cudaError_t error = cudaDeviceSynchronize();
  return !failed(what, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}

struct Results {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  bool operator==(const Results& other) const {
    return out == other.out &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

class Step {
 public:
  Step(const Options& o, const Inputs& in)
      : options_(o),
        q_latent_(in.q_latent),
        q_rope_(in.q_rope),
        kv_cache_(in.kv_cache),
        block_table_(in.block_table),
        lengths_(in.lengths),
        planned_(planned_lengths(o, in)),
        metadata_(static_cast<size_t>(default_parts(o)) * kScheduleColumns),
        splits_(o.b + 1),
        out_(in.q_latent.size()),
        lse_(in.q_latent.size() / kKvLoraRank),
        partial_out_(partial_rows(o) * kHeadDimV),
        partial_rows_(partial_rows(o)),
        params_(decode_params(o)) {
    params_.q_latent = q_latent_.get();
    params_.q_rope = q_rope_.get();
    params_.kv_cache = kv_cache_.get();
    params_.block_table = block_table_.get();
    params_.cache_seqlens = lengths_.get();
    params_.tile_scheduler_metadata = metadata_.get();
    params_.num_splits = splits_.get();
    params_.out = out_.get();
    params_.lse = lse_.get();
    params_.partial_out = partial_out_.get();
    params_.partial_rows = partial_rows_.get();
    params_.num_pages = in.num_pages;
    params_.max_pages_per_seq = in.max_pages_per_seq;
    params_.softmax_scale = scale();
    metadata_.poison();
    splits_.poison();
  }

  static float scale() { return 1.f / std::sqrt(192.f); }

  // The schedule of the run before stays: an early start may read it while it is written again.
  bool run(bool serial, unsigned delay, Results& results) {
    out_.poison();
    lse_.poison();
    partial_out_.poison();
    partial_rows_.poison();
    params_.serial = serial;
    params_.delay_seed = delay;
    const ScheduleParams plan = {planned_.get(), metadata_.get(), splits_.get(), options_.b,
                                 params_.num_sm_parts};
    // Nothing awaits the schedule on the host: decode may be at its start while it is written.
    if (failed("schedule", launch_schedule(plan, nullptr))) return false;
    if (failed("decode", launch_decode(params_, nullptr)) || !synchronize("decode")) return false;
    results = {out_.host(), lse_.host()};
    return true;
  }

 private:
  static size_t partial_rows(const Options& o) {
    return static_cast<size_t>(2) * default_parts(o) * o.s_q * o.h_q;
  }
  static std::vector<int> planned_lengths(const Options& o, const Inputs& in) {
    std::vector<int> planned = in.lengths;
    for (int& length : planned) length += o.stale;
    return planned;
  }

  const Options& options_;
  DeviceArray<uint16_t> q_latent_, q_rope_, kv_cache_;
  DeviceArray<int> block_table_, lengths_, planned_, metadata_, splits_;
  DeviceArray<uint16_t> out_;
  DeviceArray<float> lse_;
  DeviceArray<uint16_t> partial_out_;
  DeviceArray<PartialRow> partial_rows_;
  DecodeParams params_;
};

// Relative error of each of some rows (all of them in small cases), and of its lse.
bool compare(const Options& o, const Inputs& in, const Results& results) {
  const size_t vectors = results.lse.size();
  const size_t stride = vectors > 512 ? vectors / 211 : 1;
  double worst = 0, worst_lse = 0;
  size_t worst_vector = 0, bad = 0, checked = 0;
  std::vector<double> expected;
  for (size_t v = 0; v < vectors; v += stride, ++checked) {
    const int head = static_cast<int>(v % o.h_q), query = static_cast<int>(v / o.h_q % o.s_q);
    const double lse = reference_row(o, in, Step::scale(), static_cast<int>(v / o.h_q / o.s_q),
                                     query, head, expected);
    double difference = 0, norm = 0;
    for (int d = 0; d < kHeadDimV; ++d) {
      const double got = to_float(results.out[v * kHeadDimV + d], o.fp16);
      difference += (got - expected[d]) * (got - expected[d]);
      norm += expected[d] * expected[d];
    }
    const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    const double lse_error =
        lse == results.lse[v] ? 0 : std::fabs(lse - results.lse[v]) / std::max(1.0, std::fabs(lse));
    if (!(error < (o.fp16 ? 1e-3 : 6e-3) && lse_error < 2e-5)) {
      if (bad++ < 5) {
        std::printf("  vector %zu (query %d, head %d): error %.3e, lse %.7f expected %.7f\n", v,
                    query, head, error, results.lse[v], lse);
      }
    }
    if (!(error <= worst)) {
      worst = error;
      worst_vector = v;
    }
    worst_lse = std::max(worst_lse, lse_error);
  }
  std::printf("%s %zu rows, %zu bad, worst error %.3e (vector %zu), worst lse error %.2e\n",
              bad ? "FAIL" : "ok", checked, bad, worst, worst_vector, worst_lse);
  return bad == 0;
}

bool check(const Options& o) {
  const Inputs in = make_inputs(o);
  Step step(o, in);
  Results first, again;
  if (!step.run(o.serial != 0, o.delay, first)) return false;
  for (int i = 1; i < o.repeats; ++i) {
    if (!step.run(o.serial != 0, o.delay ? o.delay + i : 0, again)) return false;
    if (!(first == again)) {
      std::printf("FAIL repeat %d differs\n", i);
      return false;
    }
  }
  if (o.golden && !o.stale) {
    if (!step.run(!o.serial, 0, again)) return false;
    if (!(first == again)) {
      std::printf("FAIL serial and pipelined kernels differ\n");
      compare(o, in, first);
      compare(o, in, again);
      return false;
    }
  }
  if (!o.check || o.stale) {
    std::printf("ok (ran)\n");
    return true;
  }
  return compare(o, in, first);
}

}  // namespace
}  // namespace flashmla::runner

int main(int count, char** words) {
  using namespace flashmla::runner;
  Options options;
  if (!parse_options(count, words, options)) return 2;
  if (options.ceiling) return time_read() ? 0 : 1;
  if (failed("prepare", flashmla::prepare_device())) return 1;
  return (options.calls > 0 ? time_calls(options) : check(options)) ? 0 : 1;
}
