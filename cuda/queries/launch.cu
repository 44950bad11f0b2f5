// Host side: how the work is shared, the kernel for so many tokens, tensor maps.
#include <algorithm>
#include <iterator>

#include "../decode/tensor_map.h"
#include "../launch_config.h"
#include "../schedule/plan.h"
#include "kernel.cuh"
#include "launch.h"

namespace flashmla::queries {
namespace {

constexpr int kFewestTokens = 8;
constexpr int kSms = 132;  // more blocks than this run one after the other

// Clusters that run at once. They do not fill the GPCs (H200: 30 of four blocks, 15 of eight).
struct Clusters {
  int blocks;
  int at_once;
};
constexpr Clusters kClusters[] = {{2, 64}, {3, 40}, {4, 30}, {8, 14}};
static_assert(kClusters[std::size(kClusters) - 1].blocks == kMostSplits);

using Function = void (*)(Arguments);

struct Kernel {
  Function function;
  int tokens;
  int threads;
  int shared_bytes;
};

template <class T, int kNopeTiles, int kTokens, bool kSplits>
Kernel kernel() {
  return {queries_kernel<T, kNopeTiles, kTokens, kSplits>, kTokens, kThreads<kNopeTiles>,
          sizeof(Storage<kNopeTiles, kTokens, kSplits>)};
}

template <class T, int kNopeTiles, int kTokens>
Kernel kernel(bool splits) {
  if constexpr (kTokens <= most_split_tokens(kNopeTiles)) {
    if (splits) return kernel<T, kNopeTiles, kTokens, true>();
  }
  return kernel<T, kNopeTiles, kTokens, false>();
}

template <class T, int kNopeTiles>
Kernel kernel_for(int tokens, bool splits) {
  if (tokens <= 8) return kernel<T, kNopeTiles, 8>(splits);
  if (tokens <= 16) return kernel<T, kNopeTiles, 16>(splits);
  if (tokens <= 32) return kernel<T, kNopeTiles, 32>(splits);
  if (tokens <= 64) return kernel<T, kNopeTiles, 64>(splits);
  return kernel<T, kNopeTiles, 128>(splits);
}

template <class T>
Kernel kernel_for(int nope, int tokens, bool splits) {
  return nope == 2 * kTile ? kernel_for<T, 2>(tokens, splits) : kernel_for<T, 3>(tokens, splits);
}

Kernel kernel_for(ElementType type, int nope, int tokens, bool splits) {
  return type == ElementType::kBfloat16 ? kernel_for<__nv_bfloat16>(nope, tokens, splits)
                                        : kernel_for<__half>(nope, tokens, splits);
}

// How the grid shares the work.
struct Plan {
  int tokens;     // of a block, at most
  int row_tiles;  // blocks that share the tokens
  int heads;      // with those of what is projected down
  int splits;     // blocks that share a head
};

// More tokens than blocks of a cluster have room for only where there would be no clusters anyway.
Plan make_plan(const QueriesParams& p) {
  const int most_split = most_split_tokens(p.nope / kTile);
  const int head_tiles = p.nope / kTile + 1;
  Plan plan = {};
  plan.tokens = std::min(p.tokens, 2 * p.h_q > kSms ? kMostTokens : most_split);
  plan.row_tiles = schedule::ceil_div(p.tokens, plan.tokens);
  plan.heads = p.h_q;
  if (p.down != nullptr) plan.heads += schedule::ceil_div(kHeadDimQk / kTile, head_tiles);
  plan.splits = 1;
  for (const Clusters& clusters : kClusters) {
    const bool fit = plan.heads * plan.row_tiles <= clusters.at_once && plan.tokens <= most_split;
    const bool even = head_tiles * kTile / kVectorColumns % clusters.blocks == 0;
    if (fit && even && clusters.blocks <= p.width / kTile) plan.splits = clusters.blocks;
  }
  return plan;
}

bool encode_maps(Arguments& a, int block_tokens) {
  const QueriesParams& p = a.params;
  const auto size = [](long long count) { return static_cast<cuuint64_t>(count); };
  const cuuint64_t tokens = size(p.tokens);
  const cuuint64_t width = size(p.width);
  const cuuint64_t nope = size(p.nope);
  const cuuint64_t heads = size(p.h_q);
  const cuuint64_t head_bytes = (nope + kRopeDim) * 2;
  const cuuint64_t tiles = nope / kTile + 1;
  const auto encode = [&](CUtensorMap& map, const void* base, const cuuint64_t(&sizes)[4],
                          const cuuint64_t(&strides)[3], const cuuint32_t(&box)[4]) {
    return decode::encode(map, p.element_type, base, sizes, strides, box);
  };
  return encode(a.x_map, p.x, {kTile, tokens, width / kTile, 1},
                {width * 2, sm90::kTileRowBytes, width * tokens * 2},
                {kTile, static_cast<cuuint32_t>(block_tokens), 1, 1}) &&
         encode(a.query_up_map, p.query_up, {kTile, width, tiles, heads},
                {head_bytes * heads, sm90::kTileRowBytes, head_bytes},
                {kTile, kTile, static_cast<cuuint32_t>(tiles), 1}) &&
         encode(a.key_up_map, p.key_up, {kTile, nope, kLatentTiles, heads},
                {kKvLoraRank * 2, sm90::kTileRowBytes, nope * kKvLoraRank * 2},
                {kTile, static_cast<cuuint32_t>(nope), 1, 1}) &&
         (p.down == nullptr || encode(a.down_map, p.down, {kTile, width, kHeadDimQk / kTile, 1},
                                      {kHeadDimQk * 2, sm90::kTileRowBytes, kHeadDimQk * width * 2},
                                      {kTile, kTile, static_cast<cuuint32_t>(tiles), 1}));
}

}  // namespace

const char* prepare_queries() {
  for (const ElementType type : {ElementType::kBfloat16, ElementType::kFloat16}) {
    for (const int nope : {2 * kTile, 3 * kTile}) {
      for (int tokens = kFewestTokens; tokens <= kMostTokens; tokens *= 2) {
        for (const bool splits : {false, true}) {
          const Kernel kernel = kernel_for(type, nope, tokens, splits);
          const cudaError_t error = cudaFuncSetAttribute(
              kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
          if (error != cudaSuccess) return message(error);
        }
      }
    }
  }
  return nullptr;
}

const char* launch_queries(const QueriesParams& params, cudaStream_t stream) {
  const Plan plan = make_plan(params);
  const Kernel kernel = kernel_for(params.element_type, params.nope, plan.tokens, plan.splits > 1);
  Arguments a = {};
  a.params = params;
  a.splits = plan.splits;
  if (!decode::has_tensor_maps()) return "the driver has no cuTensorMapEncodeTiled";
  if (!encode_maps(a, kernel.tokens)) {
    return "x or weights cannot be described to the TMA unit (16-byte aligned address?)";
  }
  const LaunchConfig config(
      dim3(static_cast<unsigned>(plan.heads * plan.splits), static_cast<unsigned>(plan.row_tiles)),
      kernel.threads, kernel.shared_bytes, stream, params.early_start,
      /*cluster=*/plan.splits);
  return config.launch(kernel.function, a);
}

}  // namespace flashmla::queries
