// XLA runs this stage before each execution of each call, outside graph capture and with the
// call's device current. The work is done once per device.
#include <atomic>
#include <cstdint>
#include <string>

#include "../cache/launch.h"
#include "../exchange/launch.h"
#include "../launch.h"
#include "../merge/launch.h"
#include "../queries/launch.h"
#include "handlers.h"
#include "launch_error.h"

namespace flashmla {
namespace {

namespace ffi = ::xla::ffi;

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A driver serves every runtime of its own major version and of older ones.
ffi::Error check_driver() {
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) {
    return launch_error(cudaGetErrorString(error));
  }
  if (driver / 1000 >= CUDART_VERSION / 1000) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    "driver: got one for CUDA " + cuda_version(driver) +
                        ", expected one for CUDA " + cuda_version(CUDART_VERSION) +
                        ", which the kernels were built with");
}

ffi::Error prepare() {
  static std::atomic<uint64_t> prepared = 0;  // a bit per device; more than 64 are not remembered
  if (ffi::Error error = check_driver(); error.failure()) return error;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return launch_error(cudaGetErrorString(error));
  }
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared.load() & bit) return ffi::Error::Success();
  for (const auto load :
       {prepare_device, cache::prepare_append, cache::prepare_gather, queries::prepare_queries,
        merge::prepare_merge, exchange::prepare_exchange}) {
    if (const char* reason = load()) return launch_error(reason);
  }
  prepared.fetch_or(bit);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_prepare_handler, flashmla::prepare,
                              xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>());
