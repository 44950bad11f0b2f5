#include "workload.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace flashmla::runner {
namespace {

constexpr size_t kPoolPages = 58000;  // 4.3 GB with one KV head
constexpr size_t kPatternPages = 256;
// As benchmarks/workload.py: what the data are decides the power drawn, hence the clock.
constexpr float kSoftmaxScale = 0.3f, kQLatentSpread = 0.02f, kQRopeSpread = 1.f / (0.3f * 8.f);

std::vector<uint16_t> normal_values(const Options& o, size_t count, float spread, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.f, spread);
  std::vector<uint16_t> values(count);
  for (uint16_t& x : values) x = from_float(normal(random), o.fp16 != 0);
  return values;
}

size_t page_elements(const Options& o) {
  return static_cast<size_t>(kPageSize) * o.h_kv * kHeadDimQk;
}

int pages_of(int length) { return (length + kPageSize - 1) / kPageSize; }

std::vector<int> shuffled(size_t count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(3);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

int table_width(const Options& o) {
  int width = 1;
  for (int r = 0; r < o.b; ++r) width = std::max(width, pages_of(o.lengths[r]));
  return width;
}

// Rows of the workspace: two splits per part.
size_t workspace_rows(const Options& o, int parts) {
  return static_cast<size_t>(2) * parts * o.s_q * o.h_q;
}

}  // namespace

Pool::Pool(const Options& o)
    : order_(shuffled(std::max(kPoolPages, count_pages(o)))),
      data_(order_.size() * page_elements(o)) {
  const size_t page = page_elements(o);
  const std::vector<uint16_t> pattern = normal_values(o, page * kPatternPages, 1.f, 7);
  for (size_t p = 0; ok() && p < order_.size(); p += kPatternPages) {
    const size_t count = std::min(kPatternPages, order_.size() - p);
    cudaMemcpy(data() + p * page, pattern.data(), count * page * 2, cudaMemcpyHostToDevice);
  }
}

Workload::Workload(const Options& o, const Pool& pool, int calls)
    : options_(o),
      pool_(pool),
      parts_(default_parts(o)),
      width_(table_width(o)),
      vectors_(static_cast<size_t>(o.b) * o.s_q * o.h_q),
      q_latent_(normal_values(o, vectors_ * kKvLoraRank, kQLatentSpread, 1)),
      q_rope_(normal_values(o, vectors_ * kRopeDim, kQRopeSpread, 2)),
      lengths_(std::vector<int>(o.lengths.begin(), o.lengths.begin() + o.b)),
      metadata_(static_cast<size_t>(parts_) * kScheduleColumns),
      splits_(o.b + 1),
      out_(vectors_ * kHeadDimV),
      partial_out_(workspace_rows(o, parts_) * kHeadDimV),
      lse_(vectors_),
      partial_rows_(workspace_rows(o, parts_)) {
  size_t next = 0;
  for (int call = 0; call < calls; ++call) {
    std::vector<int> table(static_cast<size_t>(o.b) * width_, 0);
    for (int r = 0; r < o.b; ++r) {
      for (int p = 0; p < pages_of(o.lengths[r]); ++p, ++next) {
        table[static_cast<size_t>(r) * width_ + p] = pool.order()[next % pool.order().size()];
      }
    }
    tables_.push_back(std::make_unique<DeviceArray<int>>(table));
  }
}

ScheduleParams Workload::schedule() const {
  return {lengths_.get(), metadata_.get(), splits_.get(), options_.b, parts_};
}

DecodeParams Workload::decode(int call) const {
  DecodeParams params = decode_params(options_);
  params.q_latent = q_latent_.get();
  params.q_rope = q_rope_.get();
  params.kv_cache = pool_.data();
  params.block_table = tables_[call]->get();
  params.cache_seqlens = lengths_.get();
  params.tile_scheduler_metadata = metadata_.get();
  params.num_splits = splits_.get();
  params.out = out_.get();
  params.lse = lse_.get();
  params.partial_out = partial_out_.get();
  params.partial_rows = partial_rows_.get();
  params.num_pages = pool_.pages();
  params.max_pages_per_seq = width_;
  params.num_sm_parts = parts_;
  params.softmax_scale = kSoftmaxScale;
  return params;
}

const char* Workload::launch(Decode* decode_call, cudaStream_t stream) const {
  for (int call = 0; call < calls(); ++call) {
    if (const char* error = decode_call(decode(call), stream)) return error;
  }
  return nullptr;
}

double Workload::tokens() const {
  return std::accumulate(options_.lengths.begin(), options_.lengths.begin() + options_.b, 0.0);
}

double Workload::bytes() const {
  return tokens() * options_.h_kv * 1152 + static_cast<double>(vectors_) * (576 + 512) * 2;
}

double Workload::flop() const {
  return 2.0 * options_.s_q * options_.h_q * tokens() * (kHeadDimQk + kHeadDimV);
}

size_t count_pages(const Options& o) {
  size_t pages = 0;
  for (int r = 0; r < o.b; ++r) pages += static_cast<size_t>(pages_of(o.lengths[r]));
  return pages;
}

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace flashmla::runner
