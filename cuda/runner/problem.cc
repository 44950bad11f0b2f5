#include "problem.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace flashmla::runner {

float to_float(uint16_t bits, bool fp16) {
  if (fp16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

uint16_t from_float(float value, bool fp16) {
  if (fp16) return __half_raw(__float2half_rn(value)).x;
  return __nv_bfloat16_raw(__float2bfloat16_rn(value)).x;
}

int default_parts(const Options& o) {
  if (o.parts > 0) return o.parts;
  const int rows = o.s_q * o.h_q / o.h_kv;
  return std::max(1, 132 / (o.h_kv * ((rows + 63) / 64)));
}

DecodeParams decode_params(const Options& o) {
  DecodeParams params = {};
  params.element_type = o.fp16 ? ElementType::kFloat16 : ElementType::kBfloat16;
  params.q_latent_stride = kKvLoraRank;
  params.q_rope_stride = kRopeDim;
  params.batch = o.b;
  params.s_q = o.s_q;
  params.h_q = o.h_q;
  params.h_kv = o.h_kv;
  params.num_sm_parts = default_parts(o);
  params.causal = o.causal != 0;
  params.serial = o.serial != 0;
  params.early_start = o.early != 0;
  return params;
}

Inputs make_inputs(const Options& o) {
  std::mt19937 random(o.seed);
  std::normal_distribution<float> normal;
  Inputs in;
  in.lengths.assign(o.lengths.begin(), o.lengths.begin() + o.b);
  const auto pages = [](int length) { return (std::max(length, 0) + kPageSize - 1) / kPageSize; };
  int owned = 0;
  in.max_pages_per_seq = 1;
  for (int length : in.lengths) {
    owned += pages(length);
    in.max_pages_per_seq = std::max(in.max_pages_per_seq, pages(length) + 1);
  }
  in.num_pages = owned + o.slack_pages;
  const auto fill = [&](std::vector<uint16_t>& array, size_t count, float spread) {
    array.resize(count);
    for (uint16_t& x : array) x = from_float(spread * normal(random), o.fp16);
  };
  const size_t vectors = static_cast<size_t>(o.b) * o.s_q * o.h_q;
  fill(in.q_latent, vectors * kKvLoraRank, o.sigma);
  fill(in.q_rope, vectors * kRopeDim, o.sigma);
  fill(in.kv_cache, static_cast<size_t>(in.num_pages) * kPageSize * o.h_kv * kHeadDimQk, 1.f);
  std::vector<int> order(in.num_pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  in.block_table.assign(static_cast<size_t>(o.b) * in.max_pages_per_seq, 2147480000);
  const size_t token = static_cast<size_t>(o.h_kv) * kHeadDimQk;
  const uint16_t nan = 0xFFFF;
  int next = 0;
  for (int r = 0; r < o.b; ++r) {
    for (int p = 0; p < pages(in.lengths[r]); ++p) {
      const int page = order[next++];
      in.block_table[static_cast<size_t>(r) * in.max_pages_per_seq + p] = page;
      const int used = std::min(kPageSize, in.lengths[r] - p * kPageSize);
      std::fill(in.kv_cache.begin() + (static_cast<size_t>(page) * kPageSize + used) * token,
                in.kv_cache.begin() + static_cast<size_t>(page + 1) * kPageSize * token, nan);
    }
  }
  for (; next < in.num_pages; ++next) {
    const auto begin = in.kv_cache.begin() + static_cast<size_t>(order[next]) * kPageSize * token;
    std::fill(begin, begin + kPageSize * token, nan);
  }
  return in;
}

double reference_row(const Options& o, const Inputs& in, float scale, int request, int query,
                     int head, std::vector<double>& out) {
  const size_t vector = (static_cast<size_t>(request) * o.s_q + query) * o.h_q + head;
  const int kv_head = head / (o.h_q / o.h_kv);
  const int length = std::max(in.lengths[request], 0);
  const int keys = o.causal ? length - (o.s_q - 1 - query) : length;
  const auto key = [&](int k) {
    const int page =
        in.block_table[static_cast<size_t>(request) * in.max_pages_per_seq + k / kPageSize];
    return &in.kv_cache[((static_cast<size_t>(page) * kPageSize + k % kPageSize) * o.h_kv +
                         kv_head) *
                        kHeadDimQk];
  };
  std::vector<double> logits(std::max(keys, 0));
  double most = -std::numeric_limits<double>::infinity();
  for (int k = 0; k < keys; ++k) {
    double dot = 0;
    for (int d = 0; d < kHeadDimQk; ++d) {
      const uint16_t q = d < kKvLoraRank ? in.q_latent[vector * kKvLoraRank + d]
                                         : in.q_rope[vector * kRopeDim + d - kKvLoraRank];
      dot += static_cast<double>(to_float(q, o.fp16)) * to_float(key(k)[d], o.fp16);
    }
    logits[k] = dot * scale;
    most = std::max(most, logits[k]);
  }
  double sum = 0;
  out.assign(kHeadDimV, 0.0);
  for (int k = 0; k < keys; ++k) {
    const double weight = std::exp(logits[k] - most);
    sum += weight;
    for (int d = 0; d < kHeadDimV; ++d) out[d] += weight * to_float(key(k)[d], o.fp16);
  }
  for (double& x : out) x = keys > 0 ? x / sum : 0.0;
  return keys > 0 ? most + std::log(sum) : -std::numeric_limits<double>::infinity();
}

}  // namespace flashmla::runner
