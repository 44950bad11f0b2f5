// Command line of the runner: key=value words, one case per run.
#pragma once

#include <string>
#include <vector>

namespace flashmla::runner {

struct Options {
  int b = 2;  // batch
  int s_q = 1;
  int h_q = 16;
  int h_kv = 1;
  int parts = 0;  // num_sm_parts; 0: as the Python default on 132 SMs
  int causal = 1;
  int fp16 = 0;
  int serial = 0;      // the golden kernel
  int golden = 1;      // also run the golden kernel and ask for the same bits
  int repeats = 1;     // runs that must agree bitwise
  int early = 1;       // decode may begin before the kernel ahead has ended
  unsigned delay = 0;  // debug builds: seed of random delays, another one each repeat
  unsigned seed = 1;
  int slack_pages = 3;       // NaN pages of the pool that no request owns
  int stale = 0;             // schedule made for lengths + stale (wrong results, no fault)
  int check = 1;             // compare with float64 on the host
  int calls = 0;             // > 0: time a graph of so many calls over rotating KV sets instead
  int ceiling = 0;           // time reading memory instead
  int replay_ms = 0;         // with calls: how long each timed repeat replays; 0: one graph
  float sigma = 1.f;         // spread of the logits
  std::vector<int> lengths;  // len=: one for all, or one per request
};

// Prints what is wrong and returns false for an unknown key or a value that is no number.
bool parse_options(int count, char** words, Options& options);

}  // namespace flashmla::runner
