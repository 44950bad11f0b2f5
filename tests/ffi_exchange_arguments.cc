// Feeds the checks of the exchange's handlers with buffers made by hand; test_ffi_arguments.py runs
// it.
#include "../cuda/ffi/exchange_arguments.h"
#include "ffi_buffers.h"

namespace flashmla {
namespace {

// Two partials of nine rows on each of four devices.
struct ExchangeCall {
  Buffer outs = {Dtype::BF16, {2, 9, 512}};
  Buffer lses = {Dtype::F32, {2, 9}};
  Buffer addresses = {Dtype::U32, {4, 8}};
  Buffer out = {Dtype::BF16, {9, 512}};
  Buffer lse = {Dtype::F32, {9}};

  ffi::ErrorOr<exchange::ExchangeParams> params() {
    return exchange_params({outs.view(), lses.view(), addresses.view(), out.view(), lse.view()});
  }
};

struct AddressCall {
  Buffer address = {Dtype::U32, {1, 8}};
  int rows = 18;

  ffi::ErrorOr<uint32_t*> params() { return address_target(address.view(), rows); }
};

void test_exchange() {
  ExchangeCall call;
  const auto params = call.params();
  expect(params.has_value() && params->partials == 2 && params->rows == 9 && params->devices == 4 &&
             params->element_type == ElementType::kBfloat16,
         "a legal exchange is accepted");
  const auto breaks = expect_error<ExchangeCall>;
  breaks("outs: got float32, expected bfloat16 or float16",
         [](ExchangeCall& c) { c.outs.dtype = Dtype::F32; });
  breaks("outs: got bfloat16[2,9,64], expected bfloat16[n,n,512]",
         [](ExchangeCall& c) { c.outs.shape[2] = 64; });
  breaks("addresses: got int32[4,8], expected uint32[n,8]",
         [](ExchangeCall& c) { c.addresses.dtype = Dtype::S32; });
  breaks("addresses: got uint32[4,9], expected uint32[n,8]",
         [](ExchangeCall& c) { c.addresses.shape[1] = 9; });
  breaks("n: got 0, expected 1 to 65536", [](ExchangeCall& c) { c.outs.shape[0] = 0; });
  breaks("n * rows: got 0, expected 1 to 65536", [](ExchangeCall& c) { c.outs.shape[1] = 0; });
  breaks("n * rows: got 65538, expected 1 to 65536",
         [](ExchangeCall& c) { c.outs.shape[1] = 32769; });
  breaks("devices: got 0, expected 1 to 16", [](ExchangeCall& c) { c.addresses.shape[0] = 0; });
  breaks("devices: got 17, expected 1 to 16", [](ExchangeCall& c) { c.addresses.shape[0] = 17; });
  breaks("lses: got float32[9,2], expected float32[2,9]",
         [](ExchangeCall& c) { c.lses.shape = {9, 2}; });
  breaks("out: got float16[9,512], expected bfloat16[9,512]",
         [](ExchangeCall& c) { c.out.dtype = Dtype::F16; });
  breaks("lse: got float32[8], expected float32[9]", [](ExchangeCall& c) { c.lse.shape = {8}; });
}

void test_address() {
  AddressCall call;
  expect(call.params().has_value(), "a legal address is accepted");
  const auto breaks = expect_error<AddressCall>;
  breaks("rows: got 0, expected 1 to 65536", [](AddressCall& c) { c.rows = 0; });
  breaks("rows: got 65537, expected 1 to 65536", [](AddressCall& c) { c.rows = 65537; });
  breaks("address: got uint32[8], expected uint32[1,8]",
         [](AddressCall& c) { c.address.shape = {8}; });
  breaks("address: got float32[1,8], expected uint32[1,8]",
         [](AddressCall& c) { c.address.dtype = Dtype::F32; });
}

}  // namespace
}  // namespace flashmla

int main() {
  flashmla::test_exchange();
  flashmla::test_address();
  return flashmla::failures == 0 ? 0 : 1;
}
