// Where the devices of one process leave partial results for each other: the layout that both sides
// know, and what one device tells the others about its own.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flashmla::exchange {

inline constexpr int kMaxDevices = 16;    // of a host
inline constexpr int kMaxBlocks = 128;    // of an exchange: fewer than a Hopper GPU runs at once
inline constexpr int kMaxRows = 1 << 16;  // partial rows of one device

// A row of 512 columns of 16 bits and its lse, as it lies in a slot; row.cuh says why.
inline constexpr int kRowWords = kHeadDimV / 2;
inline constexpr int kChunkWords = 3;  // of 4: the last one is the number of the exchange
inline constexpr int kRowChunks = (kRowWords + 1 + kChunkWords - 1) / kChunkWords;
inline constexpr int kChunkBytes = 16;

// One per device, at an address that never changes, zero at first.
struct Mailbox {
  uint32_t exchanges[kMaxDevices];  // done so far with each device
  uint32_t blocks_done;             // of the exchange that runs
  uint32_t late;  // a device was, since the address was asked for: no more waiting
};

// What a device tells the others. It travels as eight words of 32 bits.
struct alignas(16) Address {
  uint64_t process;  // a random number: addresses of another process mean nothing here
  Mailbox* mailbox;
  void* slots;         // [2, host's devices, capacity, kRowChunks] chunks
  uint32_t capacity;   // rows
  uint16_t ordinal;    // CUDA's number of the device in its process
  uint16_t reachable;  // a bit per ordinal: whose memory it can write
};
inline constexpr int kAddressWords = sizeof(Address) / sizeof(uint32_t);
static_assert(kAddressWords == 8);

inline constexpr int64_t slots_bytes(int64_t devices, int64_t capacity) {
  return 2 * devices * capacity * kRowChunks * kChunkBytes;
}

// The current device's mailbox, which launch_address made, and how many devices the process sees.
// Returns nullptr when it succeeded, else the reason it did not.
const char* own_mailbox(Mailbox*& mailbox, int& devices);

}  // namespace flashmla::exchange
