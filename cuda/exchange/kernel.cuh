// Every device writes partial rows into the mailboxes of the others, over NVLink, and merges what
// comes into its own. In one kernel, a warp to a row:
//
//   1 meet    read the addresses; do all devices have room for so many rows, and reach each other?
//   2 write   own partials, into the slots of those who merge the row
//   3 merge   by device, then by partial, as they come
//   4 count   the last block counts the exchange
//
// All devices merge all rows, each for itself, in the same order: the same bits. Or, with more
// devices and rows, where that would be too many bytes, in two rounds: row r is merged by device
// r % n alone, which writes the result to the others.
//
// The numbers of two devices' exchanges with each other are the same on both, because both run the
// same programs; they need no reset. Slots are used by turns, even and odd: a device writes number
// N + 2 when its N + 1 is over, for which the other one wrote after the end of its own N.
//
// A row is awaited by those who have written theirs, and all blocks of a grid run at once: at most
// kMaxBlocks. A device that does not come in time, or that another one cannot reach, leaves
// NaN in the results of this exchange and the program's later ones, and nobody waiting.
#pragma once

#include "../merge/sum.cuh"
#include "mailbox.h"
#include "params.h"
#include "row.cuh"

namespace flashmla::exchange {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBatch = 4;  // rows that a warp awaits together

__device__ __forceinline__ uint64_t now() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// Who exchanges, as every block reads it.
struct Meeting {
  Address addresses[kMaxDevices];
  uint32_t numbers[kMaxDevices];  // of this exchange, with each of them
  int me;
  bool possible;  // all devices come to the same answer: they read the same addresses
  bool late;      // a device was, earlier in this program
  uint64_t deadline;

  // Slots of the rows that `writer` gives to `owner`, both by their place among the addresses.
  __device__ __forceinline__ uint4* slots(int owner, int writer, int host_devices) const {
    const uint32_t number = numbers[owner == me ? writer : owner];
    const Address& address = addresses[owner];
    const int64_t place =
        static_cast<int64_t>(number & 1) * host_devices + addresses[writer].ordinal;
    return static_cast<uint4*>(address.slots) + place * address.capacity * kRowChunks;
  }
};

__device__ __forceinline__ void meet(Meeting& meeting, const ExchangeParams& p,
                                     const Mailbox* mailbox) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool in_group = thread < p.devices;
  Address address;
  uint32_t exchanges = 0;
  uint32_t late = 0;
  if (thread == 0) late = mailbox->late;
  if (thread < kMaxDevices) exchanges = mailbox->exchanges[thread];
  if (in_group) {
    address = reinterpret_cast<const Address*>(p.addresses)[thread];
    meeting.addresses[thread] = address;
    if (address.mailbox == mailbox) meeting.me = thread;
  }
  const bool present = __syncthreads_or(in_group && address.mailbox == mailbox) != 0;
  if (thread < 32) {
    const uint32_t number =
        __shfl_sync(~0u, exchanges, in_group ? address.ordinal % kMaxDevices : 0) + 1;
    if (in_group) meeting.numbers[thread] = number;
  }
  bool fits = true;
  if (in_group) {
    uint32_t group = 0;
    for (int i = 0; i < p.devices; ++i) group |= 1u << meeting.addresses[i].ordinal % kMaxDevices;
    fits = address.process == meeting.addresses[0].process &&
           (address.reachable & group) == group &&
           address.capacity >= static_cast<uint32_t>(p.partials * p.rows);
  }
  const bool possible = __syncthreads_and(present && fits) != 0;
  if (thread == 0) {
    meeting.possible = possible;
    meeting.late = late != 0;
    meeting.deadline = now() + p.patience_ns;
  }
  __syncthreads();
}

// One warp's part in the exchange of a row.
template <class T>
class Row {
 public:
  __device__ __forceinline__ Row(const ExchangeParams& p, const Meeting& meeting, int host_devices,
                                 int row)
      : p_(p),
        meeting_(meeting),
        host_devices_(host_devices),
        row_(row),
        lane_(static_cast<int>(threadIdx.x) % 32),
        merger_(p.two_rounds ? row % p.devices : meeting.me) {}

  // Whether this device merges the row.
  __device__ __forceinline__ bool mine() const { return merger_ == meeting_.me; }

  __device__ __forceinline__ void write_partials() const {
    for (int partial = 0; partial < p_.partials; ++partial) {
      RowShare share;
      load_own(share, partial);
      if (!p_.two_rounds) {
        write_to_all(share, partial);
      } else if (!mine()) {
        write(share, merger_, partial);
      }
    }
  }

  // Returns whether all partials came in time.
  __device__ __forceinline__ bool merge() const {
    merge::Sum<kLaneColumns> sum;
    const int count = p_.devices * p_.partials;
    bool complete = true;
    for (int base = 0; base < count; base += kBatch) {
      RowShare shares[kBatch];
      bool come[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) come[i] = base + i >= count || read(shares[i], base + i);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + i >= count) continue;
        complete &= await(come[i], [&] { return read(shares[i], base + i); });
        add(sum, shares[i]);
      }
    }
    const float lse = sum.finish();
    RowShare merged;
    merged.pack<T>(sum.values, lse, lane_);
    if (!complete) fail(merged);
    store(merged);
    if (p_.two_rounds) write_to_all(merged, 0);
    return complete;
  }

  // What another device merged. Returns whether it came in time.
  __device__ __forceinline__ bool receive() const {
    RowShare merged;
    const auto read_merged = [&] { return read_from(merged, merger_, 0); };
    const bool come = await(read_merged(), read_merged);
    if (!come) fail(merged);
    store(merged);
    return come;
  }

  __device__ __forceinline__ void give_up() const {
    RowShare nothing;
    fail(nothing);
    store(nothing);
  }

 private:
  __device__ __forceinline__ int64_t at(int partial) const {
    return static_cast<int64_t>(partial) * p_.rows + row_;
  }

  __device__ __forceinline__ void load_own(RowShare& share, int partial) const {
    const uint32_t* const outs = static_cast<const uint32_t*>(p_.outs);
    share.load(outs + at(partial) * kRowWords, p_.lses + at(partial), lane_);
  }

  __device__ __forceinline__ void write(const RowShare& share, int device, int partial) const {
    uint4* const slots = meeting_.slots(device, meeting_.me, host_devices_);
    share.write(slots + at(partial) * kRowChunks, meeting_.numbers[device], lane_);
  }

  __device__ __forceinline__ void write_to_all(const RowShare& share, int partial) const {
    for (int device = 0; device < p_.devices; ++device) {
      if (device != meeting_.me) write(share, device, partial);
    }
  }

  __device__ __forceinline__ bool read_from(RowShare& share, int device, int partial) const {
    const uint4* const slots = meeting_.slots(meeting_.me, device, host_devices_);
    return share.read(slots + at(partial) * kRowChunks, meeting_.numbers[device], lane_);
  }

  // Partial `index` of all devices.
  __device__ __forceinline__ bool read(RowShare& share, int index) const {
    const int device = index / p_.partials;
    if (device != meeting_.me) return read_from(share, device, index % p_.partials);
    load_own(share, index % p_.partials);
    return true;
  }

  // Reads again until all of the warp's lanes have their shares. Returns whether they came in time.
  template <class Read>
  __device__ __forceinline__ bool await(bool come, const Read& read_again) const {
    if (__all_sync(~0u, come)) return true;
    while (!__all_sync(~0u, read_again())) {
      if (__any_sync(~0u, now() > meeting_.deadline)) return false;
    }
    return true;
  }

  __device__ __forceinline__ void add(merge::Sum<kLaneColumns>& sum, const RowShare& share) const {
    const float lse = share.lse();
    if (lse == merge::kNegativeInfinity) return;  // its values may be NaN
    float values[kLaneColumns];
    share.unpack<T>(values);
    sum.raise(lse);
    const float weight = sum.weight_of(lse);
    sum.weight += weight;
    sum.add(weight, values);
  }

  __device__ __forceinline__ void fail(RowShare& share) const {
    float values[kLaneColumns];
    for (float& value : values) value = NAN;
    share.pack<T>(values, NAN, lane_);
  }

  __device__ __forceinline__ void store(const RowShare& share) const {
    share.store(static_cast<uint32_t*>(p_.out) + at(0) * kRowWords, p_.lse + row_, lane_);
  }

  const ExchangeParams& p_;
  const Meeting& meeting_;
  int host_devices_;
  int row_;
  int lane_;
  int merger_;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const ExchangeParams p, Mailbox* const mailbox, const int host_devices) {
  __shared__ Meeting meeting;
  const int thread = static_cast<int>(threadIdx.x);
  const int first_row = static_cast<int>(blockIdx.x) * kWarps + thread / 32;
  const int rows_ahead = static_cast<int>(gridDim.x) * kWarps;
  const auto for_rows = [&](const auto& action) {
    for (int row = first_row; row < p.rows; row += rows_ahead) {
      action(Row<T>(p, meeting, host_devices, row));
    }
  };

  // 1 meet
  meet(meeting, p, mailbox);
  if (meeting.possible && !meeting.late) {
    // 2 write
    for_rows([](const Row<T>& row) { row.write_partials(); });

    // 3 merge
    for_rows([&](const Row<T>& row) {
      if (row.mine() && !row.merge()) mailbox->late = 1;
    });
    if (p.two_rounds) {
      for_rows([&](const Row<T>& row) {
        if (!row.mine() && !row.receive()) mailbox->late = 1;
      });
    }
  } else {
    for_rows([](const Row<T>& row) { row.give_up(); });
  }

  // 4 count
  if (!meeting.possible) return;
  __shared__ bool last;
  __syncthreads();
  if (thread == 0) last = atomicInc(&mailbox->blocks_done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last && thread < p.devices) {
    mailbox->exchanges[meeting.addresses[thread].ordinal] = meeting.numbers[thread];
  }
}

}  // namespace flashmla::exchange
