// What is timed: calls that rotate over a pool far beyond L2.
#pragma once

#include <memory>
#include <vector>

#include "../launch.h"
#include "options.h"
#include "problem.h"

namespace flashmla::runner {

// Pages of random keys, in a shuffled order to be dealt out.
class Pool {
 public:
  // At least as many pages as a request batch of `o` needs.
  explicit Pool(const Options& o);

  uint16_t* data() const { return data_.get(); }
  const std::vector<int>& order() const { return order_; }
  int pages() const { return static_cast<int>(order_.size()); }
  bool ok() const { return data_.ok(); }

 private:
  std::vector<int> order_;
  DeviceArray<uint16_t> data_;
};

// The arrays of one decode step, with a block table of its own for each call.
class Workload {
 public:
  Workload(const Options& o, const Pool& pool, int calls);

  using Decode = const char*(const DecodeParams&, cudaStream_t);

  ScheduleParams schedule() const;
  DecodeParams decode(int call) const;
  // All calls, one after the other; the reason where one failed.
  const char* launch(Decode* decode, cudaStream_t stream) const;
  int calls() const { return static_cast<int>(tables_.size()); }
  int parts() const { return parts_; }
  double bytes() const;  // of one call
  double flop() const;
  std::vector<uint16_t> out() const { return out_.host(); }

 private:
  double tokens() const;

  const Options& options_;
  const Pool& pool_;
  int parts_;
  int width_;  // columns of a block table
  size_t vectors_;
  DeviceArray<uint16_t> q_latent_, q_rope_;
  DeviceArray<int> lengths_, metadata_, splits_;
  DeviceArray<uint16_t> out_, partial_out_;
  DeviceArray<float> lse_;
  DeviceArray<PartialRow> partial_rows_;
  std::vector<std::unique_ptr<DeviceArray<int>>> tables_;
};

// Pages of all requests together.
size_t count_pages(const Options& o);

float median(std::vector<float> values);

}  // namespace flashmla::runner
