// The exchange of 2 to 16 devices, each played by a stream of this one GPU with a mailbox of its
// own: groups that change, in one round and in two, some streams late, one that never comes.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "../exchange/kernel.cuh"
#include "../runner/problem.h"
#include "probe.h"

namespace flashmla::probes {
namespace {

using exchange::Address;
using exchange::Mailbox;
using runner::DeviceArray;

constexpr int kDevices = exchange::kMaxDevices;
constexpr int kCapacity = 2048;  // rows of a device in a mailbox
constexpr int kPoolRows = 8192;
// Of a device. All devices' blocks run at once, none beside another on an SM, and some SMs stay
// free for delays: one that already has waiting blocks may not be able to take another kernel.
constexpr int kMostBlocks = 8;
constexpr int kMostDelay = 100'000;  // clocks, 50 us
constexpr uint64_t kPatienceNs = 3'000'000'000;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

__global__ void delay_kernel(int clocks) {
  const long long until = clock64() + clocks;
  while (clock64() < until) {
  }
}

// What all partial results are taken from: rows of 512 and their lse, every fourth row empty.
struct RowPool {
  std::vector<uint16_t> outs;
  std::vector<float> lses;

  explicit RowPool(std::mt19937& random)
      : outs(static_cast<size_t>(kPoolRows) * kHeadDimV), lses(kPoolRows) {
    std::uniform_real_distribution<float> uniform(-1.f, 1.f);
    for (uint16_t& out : outs) out = runner::from_float(uniform(random), false);
    for (size_t row = 0; row < kPoolRows; ++row) {
      lses[row] = 5.f * uniform(random);
      if (random() % 4 != 0) continue;
      lses[row] = -std::numeric_limits<float>::infinity();
      std::fill_n(outs.begin() + static_cast<int64_t>(row) * kHeadDimV, kHeadDimV, 0xFFFF);  // NaN
    }
  }
};

// A stream that plays a device.
struct Device {
  DeviceArray<uint32_t> mailbox{sizeof(Mailbox) / sizeof(uint32_t)};
  DeviceArray<uint4> slots{exchange::slots_bytes(kDevices, kCapacity) / sizeof(uint4)};
  cudaStream_t stream = nullptr;

  Device() {
    cudaMemset(mailbox.get(), 0, sizeof(Mailbox));
    cudaMemset(slots.get(), 0, exchange::slots_bytes(kDevices, kCapacity));
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  }
  ~Device() { cudaStreamDestroy(stream); }

  Address address(int ordinal) const {
    return {.process = 1,
            .mailbox = reinterpret_cast<Mailbox*>(mailbox.get()),
            .slots = slots.get(),
            .capacity = kCapacity,
            .ordinal = static_cast<uint16_t>(ordinal),
            .reachable = 0xFFFF};
  }
};

struct Plan {
  std::vector<int> group;  // in the order of the merge
  int partials;
  int rows;
  bool two_rounds;
};

// An exchange on its way: results of each of its devices.
struct Running {
  Plan plan;
  std::vector<int> first_rows;  // of the pool, for each device of the group
  std::unique_ptr<DeviceArray<Address>> addresses;
  std::vector<std::unique_ptr<DeviceArray<uint16_t>>> outs;
  std::vector<std::unique_ptr<DeviceArray<float>>> lses;
};

class World {
 public:
  explicit World(unsigned seed)
      : random_(seed), pool_(random_), outs_(pool_.outs), lses_(pool_.lses), devices_(kDevices) {
    // Loading a kernel waits for those that run: here, before any of them waits for another.
    delay_kernel<<<1, 1>>>(0);
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, exchange::exchange_kernel<__nv_bfloat16>);
  }

  // Starts an exchange on the streams of its group, but for device `absent`.
  Running start(const Plan& plan, uint64_t patience_ns = kPatienceNs, int absent = -1) {
    Running running = {plan, {}, nullptr, {}, {}};
    std::vector<Address> addresses;
    for (const int device : plan.group) {
      addresses.push_back(devices_[device].address(device));
      running.first_rows.push_back(
          static_cast<int>(random_() % (kPoolRows - plan.partials * plan.rows)));
      running.outs.push_back(std::make_unique<DeviceArray<uint16_t>>(plan.rows * kHeadDimV));
      running.lses.push_back(std::make_unique<DeviceArray<float>>(plan.rows));
      running.outs.back()->poison();
      running.lses.back()->poison();
    }
    running.addresses = std::make_unique<DeviceArray<Address>>(addresses);
    std::vector<size_t> order(plan.group.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    for (const size_t i : order) {
      if (plan.group[i] != absent) launch(running, i, patience_ns);
    }
    return running;
  }

  void compare(Mismatches& mismatches, const Running& running) const {
    const std::vector<uint16_t> out = running.outs[0]->host();
    const std::vector<float> lse = running.lses[0]->host();
    for (size_t i = 1; i < running.outs.size(); ++i) {
      const bool same =
          running.outs[i]->host() == out &&
          std::memcmp(running.lses[i]->host().data(), lse.data(), lse.size() * sizeof(float)) == 0;
      mismatches.expect(same, 1, 0, "the same bits on [devices][device]",
                        static_cast<int>(running.outs.size()), static_cast<int>(i));
    }
    std::vector<double> expected;
    for (int row = 0; row < running.plan.rows; ++row) {
      mismatches.expect(lse[row], merge(running, row, expected), 1e-5, "lse of [rows][row]",
                        running.plan.rows, row);
      for (int c = 0; c < kHeadDimV; ++c) {
        mismatches.expect(runner::to_float(out[static_cast<size_t>(row) * kHeadDimV + c], false),
                          expected[c], 1e-5 + std::fabs(expected[c]) * 4e-3, "out of [row][column]",
                          row, c);
      }
    }
  }

 private:
  void launch(const Running& running, size_t i, uint64_t patience_ns) {
    const Plan& plan = running.plan;
    const Device& device = devices_[plan.group[i]];
    const int first_row = running.first_rows[i];
    const exchange::ExchangeParams params = {
        .element_type = ElementType::kBfloat16,
        .outs = outs_.get() + static_cast<int64_t>(first_row) * kHeadDimV,
        .lses = lses_.get() + first_row,
        .addresses = reinterpret_cast<const uint32_t*>(running.addresses->get()),
        .out = running.outs[i]->get(),
        .lse = running.lses[i]->get(),
        .partials = plan.partials,
        .rows = plan.rows,
        .devices = static_cast<int>(plan.group.size()),
        .two_rounds = plan.two_rounds,
        .patience_ns = patience_ns,
    };
    if (random_() % 3 == 0) {
      delay_kernel<<<1, 1, 0, device.stream>>>(static_cast<int>(random_() % kMostDelay));
    }
    const int wanted = (plan.rows + exchange::kWarps - 1) / exchange::kWarps;
    exchange::exchange_kernel<__nv_bfloat16>
        <<<std::min(wanted, kMostBlocks), exchange::kThreads, 0, device.stream>>>(
            params, reinterpret_cast<Mailbox*>(device.mailbox.get()), kDevices);
  }

  // One row in float64; returns its lse.
  double merge(const Running& running, int row, std::vector<double>& out) const {
    double most = -kInfinity;
    double sum = 0;
    const auto for_partials = [&](const auto& visit) {
      for (const int first : running.first_rows) {
        for (int k = 0; k < running.plan.partials; ++k) {
          const size_t place = static_cast<size_t>(first + k * running.plan.rows + row);
          if (pool_.lses[place] > -kInfinity) visit(place);
        }
      }
    };
    for_partials([&](size_t place) { most = std::max<double>(most, pool_.lses[place]); });
    out.assign(kHeadDimV, 0.0);
    if (most == -kInfinity) return most;
    for_partials([&](size_t place) {
      const double weight = std::exp(pool_.lses[place] - most);
      sum += weight;
      for (size_t c = 0; c < kHeadDimV; ++c) {
        out[c] += weight * runner::to_float(pool_.outs[place * kHeadDimV + c], false);
      }
    });
    for (double& x : out) x /= sum;
    return most + std::log(sum);
  }

  std::mt19937 random_;
  RowPool pool_;
  DeviceArray<uint16_t> outs_;
  DeviceArray<float> lses_;
  std::vector<Device> devices_;
};

std::vector<int> devices(int begin, int end, int step = 1) {
  std::vector<int> group;
  for (int device = begin; device < end; device += step) group.push_back(device);
  return group;
}

// In each turn every device takes part once, so that all go on at their own speed.
std::vector<Plan> make_plans() {
  std::vector<Plan> plans;
  for (const bool two_rounds : {false, true}) {
    for (const int n : {16, 8, 4, 2}) {
      for (const auto& [partials, rows] : {std::pair{1, 1}, {2, 9}, {1, 70}, {3, 300}, {1, 1100}}) {
        for (int begin = 0; begin < kDevices; begin += n) {
          std::vector<int> group = devices(begin, begin + n);
          if (rows == 70) std::reverse(group.begin(), group.end());
          plans.push_back({group, partials, rows, two_rounds});
        }
      }
      plans.push_back({devices(0, kDevices, 2), 1, 40, !two_rounds});
      plans.push_back({devices(1, kDevices, 2), 1, 40, two_rounds});
      plans.push_back({devices(0, 3), 2, 50, two_rounds});
      plans.push_back({devices(3, kDevices), 1, 33, two_rounds});
    }
  }
  return plans;
}

}  // namespace

bool probe_exchange() {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // a queue for each stream
  Mismatches mismatches;
  World world(1);
  std::vector<Running> all;
  for (const Plan& plan : make_plans()) all.push_back(world.start(plan));
  mismatches.synchronize("exchange_kernel");
  for (const Running& running : all) world.compare(mismatches, running);

  const Plan plan = {devices(0, 4), 1, 20, true};
  const Running late = world.start(plan, /*patience_ns=*/20'000'000, /*absent=*/2);
  mismatches.synchronize("exchange_kernel without one of its devices");
  for (const int present : {0, 1, 3}) {
    const std::vector<float> lse = late.lses[present]->host();
    for (int row = 0; row < plan.rows; ++row) {
      mismatches.expect(std::isnan(lse[row]), 1, 0, "NaN where one is absent: [device][row]",
                        present, row);
    }
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
