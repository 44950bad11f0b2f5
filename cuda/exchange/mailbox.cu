// The mailboxes of this process, one per device, and how their addresses get to the other devices:
// as data. Each device's program writes the address of its own into an array, and the program
// gathers those arrays as any others. So no device's host thread ever waits for another's.
//
// What a program was told stays true: a mailbox never moves, and slots that became too few are kept
// beside the larger ones.
#include <array>
#include <bit>
#include <mutex>
#include <random>

#include "../message.h"
#include "launch.h"
#include "mailbox.h"

namespace flashmla::exchange {
namespace {

// Locked for each device alone: allocating may wait for work that awaits another device.
struct Held {
  std::mutex mutex;
  Address address = {};
};

std::array<Held, kMaxDevices>& held() {
  static std::array<Held, kMaxDevices> all;
  return all;
}

uint64_t process_number() {
  static const uint64_t number = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return number;
}

// Lets kernels of the current device write to the others' memory, as far as they are linked.
cudaError_t reach_others(int device, int devices, uint16_t& reachable) {
  for (int other = 0; other < devices; ++other) {
    int linked = other == device;
    if (!linked) {
      if (const cudaError_t error = cudaDeviceCanAccessPeer(&linked, device, other)) return error;
      if (!linked) continue;
      const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
      if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) return error;
      cudaGetLastError();  // that it was enabled already is no error
    }
    reachable |= static_cast<uint16_t>(1 << other);
  }
  return cudaSuccess;
}

// Zeroed before `stream` goes on.
cudaError_t allocate(void*& memory, int64_t bytes, cudaStream_t stream) {
  void* allocated = nullptr;
  // Another thread may be capturing a graph meanwhile; this allocation is no part of it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) {
    error = cudaMalloc(&allocated, static_cast<size_t>(bytes));
    cudaThreadExchangeStreamCaptureMode(&mode);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(allocated, 0, static_cast<size_t>(bytes), stream);
  }
  if (error == cudaSuccess) memory = allocated;
  return error;
}

// The address of a mailbox with room for `rows` of each device.
cudaError_t open(int device, int devices, int rows, cudaStream_t stream, Address& address) {
  Held& mine = held()[device];
  const std::lock_guard lock(mine.mutex);
  Address& known = mine.address;
  cudaError_t error = cudaSuccess;
  if (known.mailbox == nullptr) {
    known.process = process_number();
    known.ordinal = static_cast<uint16_t>(device);
    known.reachable = 0;
    error = reach_others(device, devices, known.reachable);
    void* mailbox = nullptr;
    if (error == cudaSuccess) error = allocate(mailbox, sizeof(Mailbox), stream);
    known.mailbox = static_cast<Mailbox*>(mailbox);
  }
  if (error == cudaSuccess && known.capacity < static_cast<uint32_t>(rows)) {
    const uint32_t capacity = std::bit_ceil(static_cast<uint32_t>(rows));
    error = allocate(known.slots, slots_bytes(devices, capacity), stream);
    if (error == cudaSuccess) known.capacity = capacity;
  }
  address = known;
  return error;
}

// A program begins.
__global__ void address_kernel(Address address, Address* target) {
  address.mailbox->late = 0;
  *target = address;
}

const char* current_device(int& device, int& devices) {
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return message(error);
  return devices > kMaxDevices ? "more than 16 devices in one process" : nullptr;
}

}  // namespace

const char* own_mailbox(Mailbox*& mailbox, int& devices) {
  int device = 0;
  if (const char* reason = current_device(device, devices)) return reason;
  const std::lock_guard lock(held()[device].mutex);
  mailbox = held()[device].address.mailbox;
  return mailbox == nullptr ? "no address of this device's mailbox was asked for" : nullptr;
}

const char* launch_address(uint32_t* address, int rows, cudaStream_t stream) {
  int device = 0;
  int devices = 0;
  if (const char* reason = current_device(device, devices)) return reason;
  Address own = {};
  const cudaError_t error = open(device, devices, rows, stream, own);
  if (error != cudaSuccess) return message(error);
  address_kernel<<<1, 1, 0, stream>>>(own, reinterpret_cast<Address*>(address));
  return message(cudaGetLastError());
}

}  // namespace flashmla::exchange
