// Several builds of the kernels in turns on the same rows and data: which one is faster?
//
//   flashmla_compare rows.txt before.so after.so          microseconds per call, medians
//   TURN_MS=250 REST_MS=0 flashmla_compare …              at the clock that full power leaves
//
// A line of the rows is one row in the words of flashmla_runner (options.h): b=128 h_q=128
// len=4096. A build is libflashmla_kernels.so of `make runner`, copied away. A row whose results
// are not the first build's, bit for bit, says so.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "../runner/replay.h"
#include "../runner/workload.h"
#include "library.h"

namespace flashmla::runner {
namespace {

constexpr int kRounds = 5;
constexpr size_t kCallBytes = size_t{4} << 30;  // of keys that a graph's calls read together

int environment_number(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

struct Build {
  std::string name;
  decltype(&flashmla_prepare) prepare;
  decltype(&flashmla_schedule) schedule;
  decltype(&flashmla_decode) decode;
};

template <class Function>
bool look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// nullptr where the file is not such a library, or has nothing for this device.
std::unique_ptr<Build> open_build(const char* path) {
  auto build = std::make_unique<Build>();
  const std::string file = path;
  build->name = file.substr(file.rfind('/') + 1);
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr || !look_up(library, "flashmla_prepare", build->prepare) ||
      !look_up(library, "flashmla_schedule", build->schedule) ||
      !look_up(library, "flashmla_decode", build->decode)) {
    std::printf("FAIL %s: %s\n", path, dlerror());
    return nullptr;
  }
  if (const char* const error = build->prepare()) {
    std::printf("FAIL %s: %s\n", path, error);
    return nullptr;
  }
  return build;
}

bool parse_row(const std::string& line, Options& options) {
  std::vector<std::string> words = {""};
  std::istringstream stream(line);
  for (std::string word; stream >> word;) words.push_back(word);
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  return parse_options(static_cast<int>(pointers.size()), pointers.data(), options);
}

// One build's calls on a row.
class Contender {
 public:
  Contender(const Build& build, const Workload& work)
      : build_(build),
        work_(work),
        replay_([&](cudaStream_t stream) { return work.launch(build.decode, stream); }) {}

  // Leaves the results of the last call behind.
  const char* warm_up() {
    if (const char* const error = schedule()) return error;
    replay_.run(1);
    return replay_.error();
  }

  // Each build makes its own schedule before its turn.
  const char* take_turn(int turn_ms, int rest_ms) {
    if (const char* const error = schedule()) return error;
    replay_.run(1);
    usleep(static_cast<useconds_t>(rest_ms) * 1000);
    const float once = replay_.run(1);
    const int replays = std::max(1, static_cast<int>(static_cast<float>(turn_ms) / once));
    const float ms = replay_.run(replays);
    us_.push_back(ms * 1000.f / static_cast<float>(replays * work_.calls()));
    return replay_.error();
  }

  float us() const { return median(us_); }

 private:
  const char* schedule() {
    const char* const error = build_.schedule(work_.schedule(), nullptr);
    cudaDeviceSynchronize();
    return error;
  }

  const Build& build_;
  const Workload& work_;
  Replay replay_;
  std::vector<float> us_;
};

// Prints a row's medians, and which builds' results differ from the first one's.
bool compare_row(const std::string& line, const Options& o, const Pool& pool,
                 const std::vector<std::unique_ptr<Build>>& builds) {
  const size_t call_bytes = count_pages(o) * kPageSize * kHeadDimQk * 2 + 1;
  const int calls = static_cast<int>(std::clamp<size_t>(kCallBytes / call_bytes, 4, 64));
  const Workload work(o, pool, calls);
  std::vector<std::unique_ptr<Contender>> contenders;
  std::vector<uint16_t> first;
  std::string differing;
  for (const auto& build : builds) {
    contenders.push_back(std::make_unique<Contender>(*build, work));
    if (const char* const error = contenders.back()->warm_up()) {
      std::printf("FAIL %s: %s\n", build->name.c_str(), error);
      return false;
    }
    const std::vector<uint16_t> out = work.out();
    if (first.empty()) first = out;
    if (out != first) differing += " " + build->name;
  }
  const int turn_ms = environment_number("TURN_MS", 20),
            rest_ms = environment_number("REST_MS", 20);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t turn = 0; turn < contenders.size(); ++turn) {
      Contender& contender = *contenders[(turn + round) % contenders.size()];
      if (const char* const error = contender.take_turn(turn_ms, rest_ms)) {
        std::printf("FAIL %s: %s\n", line.c_str(), error);
        return false;
      }
    }
  }
  std::printf("%-32s", line.c_str());
  for (const auto& contender : contenders) std::printf(" %14.2f", contender->us());
  std::printf("%s%s\n", differing.empty() ? "" : "  other results:", differing.c_str());
  std::fflush(stdout);
  return true;
}

bool compare(const char* rows, int count, char** paths) {
  std::vector<std::unique_ptr<Build>> builds;
  for (int i = 0; i < count; ++i) {
    builds.push_back(open_build(paths[i]));
    if (builds.back() == nullptr) return false;
  }
  std::printf("%-32s", "us per call");
  for (const auto& build : builds) std::printf(" %14s", build->name.c_str());
  std::printf("\n");
  std::ifstream file(rows);
  std::unique_ptr<Pool> pool;  // the first row's, for all
  Options first;
  for (std::string line; std::getline(file, line);) {
    Options options;
    if (line.empty() || line[0] == '#') continue;
    if (!parse_row(line, options)) return false;
    if (pool == nullptr) {
      pool = std::make_unique<Pool>(options);
      first = options;
    } else if (options.h_kv != first.h_kv || options.fp16 != first.fp16) {
      std::printf("FAIL %s: another h_kv or dtype than the first row's\n", line.c_str());
      return false;
    }
    if (!compare_row(line, options, *pool, builds)) return false;
  }
  return true;
}

}  // namespace
}  // namespace flashmla::runner

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: flashmla_compare ROWS LIBRARY...\n");
    return 2;
  }
  return flashmla::runner::compare(words[1], count - 2, words + 2) ? 0 : 1;
}
