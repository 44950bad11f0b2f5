#include "options.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>

namespace flashmla::runner {
namespace {

bool parse_lengths(const std::string& text, std::vector<int>& lengths) {
  std::stringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');)
    lengths.push_back(std::atoi(word.c_str()));
  return !lengths.empty();
}

}  // namespace

bool parse_options(int count, char** words, Options& o) {
  const std::map<std::string, int*> integers = {{"b", &o.b},
                                                {"s_q", &o.s_q},
                                                {"h_q", &o.h_q},
                                                {"h_kv", &o.h_kv},
                                                {"parts", &o.parts},
                                                {"causal", &o.causal},
                                                {"fp16", &o.fp16},
                                                {"serial", &o.serial},
                                                {"golden", &o.golden},
                                                {"early", &o.early},
                                                {"repeats", &o.repeats},
                                                {"slack_pages", &o.slack_pages},
                                                {"stale", &o.stale},
                                                {"check", &o.check},
                                                {"calls", &o.calls},
                                                {"replay_ms", &o.replay_ms},
                                                {"ceiling", &o.ceiling}};
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const size_t equals = word.find('=');
    const std::string key = word.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : word.substr(equals + 1);
    const auto integer = integers.find(key);
    if (integer != integers.end()) {
      *integer->second = std::atoi(value.c_str());
    } else if (key == "seed") {
      o.seed = static_cast<unsigned>(std::atoi(value.c_str()));
    } else if (key == "delay") {
      o.delay = static_cast<unsigned>(std::atoi(value.c_str()));
    } else if (key == "sigma") {
      o.sigma = static_cast<float>(std::atof(value.c_str()));
    } else if (key != "len" || !parse_lengths(value, o.lengths)) {
      std::fprintf(stderr, "unknown option: %s\n", word.c_str());
      return false;
    }
  }
  if (o.lengths.empty()) o.lengths = {257};
  while (static_cast<int>(o.lengths.size()) < o.b) o.lengths.push_back(o.lengths.back());
  return true;
}

}  // namespace flashmla::runner
