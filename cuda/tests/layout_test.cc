// Golden values of everything that names shared memory: swizzle, descriptors, offsets, bytes,
// arrivals. A compiler that gets through this file has passed the test.
#include <array>
#include <cstdint>

#include "../decode/storage.h"

namespace flashmla {
namespace {

using sm90::swizzled_chunk;

// Swizzle: chunk c of row r at chunk position c ^ (r % 8).
static_assert(sm90::kTileBytes == 8192);
static_assert(swizzled_chunk(0, 0) == 0 && swizzled_chunk(0, 7) == 112);
static_assert(swizzled_chunk(1, 0) == 144 && swizzled_chunk(1, 1) == 128);
static_assert(swizzled_chunk(7, 0) == 1008 && swizzled_chunk(7, 7) == 896);
static_assert(swizzled_chunk(8, 3) == 1072 && swizzled_chunk(63, 7) == 8064);

// The same as the hardware does it: address bits 7-9 are added to bits 4-6 without carry.
constexpr bool swizzle_is_the_hardware_one() {
  for (uint32_t address = 0; address < sm90::kTileBytes; address += sm90::kChunkBytes) {
    const uint32_t row = address / 128;
    const uint32_t chunk = address / 16 % 8;
    if (swizzled_chunk(row, chunk) != (address ^ (address >> 3 & 0x70))) return false;
  }
  return true;
}
static_assert(swizzle_is_the_hardware_one());

constexpr bool swizzle_is_one_to_one() {
  std::array<bool, 512> taken = {};
  for (uint32_t row = 0; row < 64; ++row) {
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const uint32_t place = swizzled_chunk(row, chunk);
      if (place % 16 != 0 || place / 16 >= taken.size() || taken[place / 16]) return false;
      taken[place / 16] = true;
    }
  }
  return true;
}
static_assert(swizzle_is_one_to_one());

// Descriptors, whole and field by field.
static_assert(sm90::k_major_descriptor(0x400) == 0x4000'0040'0001'0040);
static_assert(sm90::mn_major_descriptor(0x2400) == 0x4000'0040'0200'0240);

constexpr uint64_t field(uint64_t descriptor, int first, int last) {
  return descriptor >> first & ((uint64_t{1} << (last - first + 1)) - 1);
}
inline constexpr uint64_t kExample = sm90::make_descriptor(0x3'FFF0, 8192, 1024);
static_assert(field(kExample, 0, 13) == 0x3FFF);      // address / 16
static_assert(field(kExample, 14, 15) == 0);          //
static_assert(field(kExample, 16, 29) == 8192 / 16);  // leading offset / 16
static_assert(field(kExample, 30, 31) == 0);
static_assert(field(kExample, 32, 45) == 1024 / 16);  // stride offset / 16
static_assert(field(kExample, 46, 48) == 0);
static_assert(field(kExample, 49, 51) == 0);  // base offset: tiles are 1024-byte aligned
static_assert(field(kExample, 52, 61) == 0);
static_assert(field(kExample, 62, 63) == 1);  // 128-byte swizzle
static_assert(sm90::kStepAlongRow == 2 && sm90::kStepDownRows == 128 && sm90::kStepTile == 512);
static_assert(sm90::k_major_descriptor(0x400) + sm90::kStepTile ==
              sm90::k_major_descriptor(0x400 + sm90::kTileBytes));
// No step carries out of the address field: all of an SM's shared memory is 228 KiB.
static_assert((228 * 1024 >> 4) < (1 << 14));

// Shared-memory map.
using decode::Storage;
static_assert(offsetof(Storage, query) == 0 && sizeof(Storage::query) == 73728);
static_assert(offsetof(Storage, pages) == 73728 && sizeof(Storage::pages) == 147456);
static_assert(offsetof(Storage, even_weights) == 221184 && sizeof(Storage::even_weights) == 8192);
static_assert(offsetof(Storage, reference) == 229376 && sizeof(Storage::reference) == 512);
static_assert(offsetof(Storage, row_sum) == 229888 && sizeof(Storage::row_sum) == 1024);
static_assert(offsetof(Storage, reference_moved) == 230912);
static_assert(sizeof(Storage::reference_moved) == 32);
static_assert(offsetof(Storage, barriers) == 230944 && sizeof(Storage::barriers) == 176);
static_assert(offsetof(Storage, part) == 231120 && sizeof(Storage::part) == 20);
static_assert(offsetof(Storage, assignments) == 231140 && sizeof(Storage::assignments) == 40);
static_assert(sizeof(Storage) == 231424 && alignof(Storage) == 1024);
static_assert(offsetof(PartialRow, scale) == 4 && sizeof(PartialRow) == 16);
static_assert(sizeof(Storage) <= 232448);  // of a block on sm_90
using decode::Barriers;
static_assert(offsetof(Barriers, page_full) == 0 && offsetof(Barriers, page_empty) == 80);
static_assert(offsetof(Barriers, query_full) == 128 && offsetof(Barriers, query_empty) == 136);
static_assert(offsetof(Barriers, weights_ready) == 144 && offsetof(Barriers, odd_scored) == 160);
static_assert(offsetof(Barriers, sums_ready) == 168);

// Page parts and boxes: tiles, and the bytes that TMA boxes of 64 x 64 elements bring.
constexpr bool tiles_are(decode::TileRange tiles, int begin, int count) {
  return tiles.begin == begin && tiles.count == count &&
         decode::bytes_of(tiles) == static_cast<uint32_t>(count) * 64 * 64 * 2;
}
static_assert(tiles_are(decode::part_tiles(decode::kLeft), 0, 4));
static_assert(tiles_are(decode::part_tiles(decode::kRight), 4, 4));
static_assert(tiles_are(decode::part_tiles(decode::kRope), 8, 1));
static_assert(tiles_are(decode::box_tiles(0), 0, 2) && tiles_are(decode::box_tiles(1), 2, 2));
static_assert(tiles_are(decode::box_tiles(2), 4, 2) && tiles_are(decode::box_tiles(3), 6, 2));
static_assert(tiles_are(decode::box_tiles(4), 8, 1) && decode::kPageBoxes == 5);
static_assert(decode::part_of(1) == decode::kLeft && decode::part_of(2) == decode::kRight);
static_assert(decode::part_of(4) == decode::kRope && decode::ends_part(4));
static_assert(!decode::ends_part(0) && decode::ends_part(1) && decode::ends_part(3));

// Arrivals.
static_assert(decode::kPageFullArrivals == 1 && decode::kPageEmptyArrivals == 4);
static_assert(decode::kQueryFullArrivals == 3 && decode::kQueryEmptyArrivals == 8);
static_assert(decode::kWeightsReadyArrivals == 32 && decode::kSumsReadyArrivals == 64);
static_assert(decode::kOddScoredArrivals == 4);

// Roles and registers.
static_assert(decode::kThreads == 384);
static_assert(decode::kProducerRegisters % 8 == 0 && decode::kMathRegisters % 8 == 0);
static_assert(128 * (decode::kProducerRegisters + 2 * decode::kMathRegisters) <= 65536);

}  // namespace
}  // namespace flashmla
