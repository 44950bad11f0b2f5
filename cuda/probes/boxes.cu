// What request_page puts where: nine swizzled tiles, from either map, of any KV head.
#include "pool.cuh"
#include "probe.h"

namespace flashmla::probes {
namespace {

__global__ void dump_page(const __grid_constant__ Arguments a, int kv_head, int page_id,
                          uint8_t* dump) {
  Storage& storage = prepare_storage();
  fetch_page(storage, a, kv_head, page_id);
  for (uint32_t i = threadIdx.x; i < decode::kPageBytes; i += blockDim.x) {
    dump[i] = storage.pages[0][i / sm90::kTileBytes][i % sm90::kTileBytes];
  }
}

}  // namespace

bool probe_boxes() {
  constexpr int kPages = 5;
  Mismatches mismatches;
  for (const int h_kv : {1, 3}) {
    const Pool pool(ElementType::kBfloat16, kPages, h_kv,
                    [](size_t i) { return static_cast<uint16_t>(i * 40503 >> 4 | 1); });
    DeviceArray<uint8_t> dump(decode::kPageBytes);
    for (const int page : {0, kPages - 1, kPages, 2147480000, -1}) {
      const int kv_head = h_kv - 1;
      launch_block(dump_page, 128, pool.arguments(), kv_head, page, dump.get());
      mismatches.synchronize("dump_page");
      const std::vector<uint8_t> bytes = dump.host();
      for (int token = 0; token < kPageSize; ++token) {
        for (int column = 0; column < kHeadDimQk; ++column) {
          const size_t place = column / 64 * sm90::kTileBytes +
                               sm90::swizzled_chunk(static_cast<uint32_t>(token), column % 64 / 8) +
                               column % 8 * 2;
          const int got = bytes[place] | bytes[place + 1] << 8;
          const bool outside = page < 0 || page >= kPages;
          const int expected = outside ? 0 : pool.bits(page, token, kv_head, column);
          mismatches.expect(got, expected, 0, outside ? "outside" : "page", token, column);
        }
      }
    }
  }
  return mismatches.none();
}

}  // namespace flashmla::probes
