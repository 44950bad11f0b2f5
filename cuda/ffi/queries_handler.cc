#include "../queries/launch.h"
#include "handlers.h"
#include "launch_error.h"
#include "queries_arguments.h"

namespace flashmla {
namespace {

// What is projected beside the queries, or nothing, into `params`.
ffi::Error read_down(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
                     queries::QueriesParams& params) {
  if (arguments.size() > 1 || results.size() != arguments.size()) {
    return mismatch("operands", std::to_string(5 + arguments.size()),
                    "5, or 6 with down and its result");
  }
  if (arguments.size() == 0) return ffi::Error::Success();
  const ffi::ErrorOr<ffi::AnyBuffer> down = arguments.get<ffi::AnyBuffer>(0);
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> projected = results.get<ffi::AnyBuffer>(0);
  if (down.has_error()) return down.error();
  if (projected.has_error()) return projected.error();
  return add_down(*down, **projected, params);
}

ffi::Error absorbed_queries(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer query_up,
                            ffi::AnyBuffer key_up, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                            ffi::RemainingArgs down, ffi::Result<ffi::AnyBuffer> q_latent,
                            ffi::Result<ffi::AnyBuffer> q_rope, ffi::RemainingRets projected,
                            bool interleave) {
  const QueriesBuffers buffers = {
      .x = x,
      .query_up = query_up,
      .key_up = key_up,
      .cos = cos,
      .sin = sin,
      .q_latent = *q_latent,
      .q_rope = *q_rope,
  };
  ffi::ErrorOr<queries::QueriesParams> params = queries_params(buffers, interleave);
  if (params.has_error()) return params.error();
  if (ffi::Error error = read_down(down, projected, *params); error.failure()) return error;
  return launch_error(queries::launch_queries(*params, stream));
}

}  // namespace
}  // namespace flashmla

XLA_FFI_DEFINE_HANDLER_SYMBOL(flashmla_absorbed_queries_handler, flashmla::absorbed_queries,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // query_up
                                  .Arg<xla::ffi::AnyBuffer>()  // key_up
                                  .Arg<xla::ffi::AnyBuffer>()  // cos
                                  .Arg<xla::ffi::AnyBuffer>()  // sin
                                  .RemainingArgs()             // down, or nothing
                                  .Ret<xla::ffi::AnyBuffer>()  // q_latent
                                  .Ret<xla::ffi::AnyBuffer>()  // q_rope
                                  .RemainingRets()             // projected, or nothing
                                  .Attr<bool>("interleave"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
