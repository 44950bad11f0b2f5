// jax_flashmla._cuda: hands the handlers to Python, which registers them with JAX. Nothing else.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "ffi/handlers.h"

namespace {

namespace py = pybind11;

py::capsule capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::dict target(XLA_FFI_Handler* execute) {
  using namespace py::literals;
  return py::dict("initialize"_a = capsule(flashmla_prepare_handler),
                  "execute"_a = capsule(execute));
}

// {target: {stage: handler}}; the target names are stable: exported programs hold them.
py::dict registrations() {
  py::dict targets;
  targets["jax_flashmla_schedule"] = target(flashmla_schedule_handler);
  targets["jax_flashmla_decode"] = target(flashmla_decode_handler);
  targets["jax_flashmla_append"] = target(flashmla_append_handler);
  targets["jax_flashmla_append_projected"] = target(flashmla_append_projected_handler);
  targets["jax_flashmla_absorbed_attention"] = target(flashmla_absorbed_attention_handler);
  targets["jax_flashmla_absorbed_queries"] = target(flashmla_absorbed_queries_handler);
  targets["jax_flashmla_gather"] = target(flashmla_gather_handler);
  targets["jax_flashmla_merge"] = target(flashmla_merge_handler);
  targets["jax_flashmla_address"] = target(flashmla_address_handler);
  targets["jax_flashmla_exchange"] = target(flashmla_exchange_handler);
  return targets;
}

std::string version(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("cuda_version"_a = version(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10),
                  "arch"_a = FLASHMLA_ARCH,
                  "xla_ffi_version"_a = version(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "XLA FFI handlers of the CUDA kernels.";
  module.def("registrations", &registrations, "{target: {stage: handler capsule}}.");
  module.def("build_info", &build_info, "What the kernels were built with and for.");
}
