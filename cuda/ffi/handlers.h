// The XLA FFI handlers. They read shapes from the buffers and only return errors. No state is
// kept but the mailboxes of the exchange.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_prepare_handler);   // initialize stage of all targets
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_schedule_handler);  // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_decode_handler);    // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_append_handler);    // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_append_projected_handler);    // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_absorbed_attention_handler);  // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_absorbed_queries_handler);    // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_gather_handler);              // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_merge_handler);               // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_address_handler);             // execute stage
XLA_FFI_DECLARE_HANDLER_SYMBOL(flashmla_exchange_handler);            // execute stage
