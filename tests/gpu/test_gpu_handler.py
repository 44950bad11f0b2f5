"""Buffers that the Python checks would refuse, straight to the FFI handlers: errors, no faults."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.testing import checking, inputs
from jax_flashmla.testing.cases import Case, Shape

SHAPE = Shape(2, 1, 16, pages=4, pool_pages=8)
PARTS = 3
Buffers = Mapping[str, tuple[tuple[int, ...], str]]

OPERANDS: Buffers = {
    "q_latent": ((2, 1, 16, 512), "bfloat16"),
    "q_rope": ((2, 1, 16, 64), "bfloat16"),
    "kv_cache": ((8, 64, 1, 576), "bfloat16"),
    "block_table": ((2, 4), "int32"),
    "cache_seqlens": ((2,), "int32"),
    "tile_scheduler_metadata": ((PARTS, 8), "int32"),
    "num_splits": ((3,), "int32"),
}
RESULTS: Buffers = {
    "out": ((2, 1, 16, 512), "bfloat16"),
    "lse": ((2, 1, 16), "float32"),
    "partial_out": ((2 * PARTS, 1, 16, 512), "float16"),
    "partial_rows": ((2 * PARTS, 1, 16, 4), "float32"),
}
WRONG: dict[str, Buffers] = {
    "float32_q": {"q_latent": ((2, 1, 16, 512), "float32")},
    "int16_q": {"q_latent": ((2, 1, 16, 512), "int16")},
    "q_rank": {"q_latent": ((2, 16, 512), "bfloat16")},
    "q_columns": {"q_latent": ((2, 1, 16, 500), "bfloat16")},
    "rope_heads": {"q_rope": ((2, 1, 8, 64), "bfloat16")},
    "rope_dtype": {"q_rope": ((2, 1, 16, 64), "float16")},
    "page_size": {"kv_cache": ((8, 32, 1, 576), "bfloat16")},
    "kv_columns": {"kv_cache": ((8, 64, 1, 512), "bfloat16")},
    "kv_heads": {"kv_cache": ((8, 64, 3, 576), "bfloat16")},
    "kv_rank": {"kv_cache": ((8, 64, 576), "bfloat16")},
    "table_batch": {"block_table": ((3, 4), "int32")},
    "table_dtype": {"block_table": ((2, 4), "float32")},
    "seqlens_batch": {"cache_seqlens": ((1,), "int32")},
    "metadata_columns": {"tile_scheduler_metadata": ((PARTS, 7), "int32")},
    "no_parts": {"tile_scheduler_metadata": ((0, 8), "int32")},
    "splits_length": {"num_splits": ((2,), "int32")},
    "small_out": {"out": ((1, 1, 16, 512), "bfloat16")},
    "out_dtype": {"out": ((2, 1, 16, 512), "float32")},
    "small_lse": {"lse": ((2, 1, 8), "float32")},
    "small_workspace": {"partial_out": ((2 * PARTS - 1, 1, 16, 512), "float16")},
    "small_row_workspace": {"partial_rows": ((2 * PARTS, 1, 8, 4), "float32")},
}


@pytest.fixture(autouse=True)
def only_on_a_gpu(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the handlers are the GPU's")


def call_decode(operands: Buffers, results: Buffers, **attributes: object) -> list[jax.Array]:
    buffers = [jnp.zeros(dims, dtype) for dims, dtype in operands.values()]
    shapes = [jax.ShapeDtypeStruct(dims, jnp.dtype(dtype)) for dims, dtype in results.values()]
    return jax.ffi.ffi_call("jax_flashmla_decode", shapes)(*buffers, **attributes)


@pytest.mark.parametrize("wrong", WRONG)
def test_decode_handler_refuses(wrong: str) -> None:
    change = WRONG[wrong]
    operands = {name: change.get(name, spec) for name, spec in OPERANDS.items()}
    results = {name: change.get(name, spec) for name, spec in RESULTS.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected"):
        jax.block_until_ready(
            call_decode(operands, results, softmax_scale=np.float32(1), causal=True)
        )


@pytest.mark.parametrize(
    "attributes",
    [{}, {"softmax_scale": np.float32(1)}, {"softmax_scale": "1", "causal": True}],
    ids=["none", "one_missing", "scale_in_words"],
)
def test_decode_handler_refuses_wrong_attributes(attributes: dict[str, object]) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call_decode(OPERANDS, RESULTS, **attributes))


@pytest.mark.parametrize(
    ("lengths", "metadata", "splits"),
    [
        (((2,), "int32"), ((PARTS, 7), "int32"), ((3,), "int32")),
        (((2,), "int32"), ((0, 8), "int32"), ((3,), "int32")),
        (((2,), "int32"), ((PARTS, 8), "int32"), ((2,), "int32")),
        (((2,), "float32"), ((PARTS, 8), "int32"), ((3,), "int32")),
        (((2, 1), "int32"), ((PARTS, 8), "int32"), ((3,), "int32")),
    ],
    ids=["columns", "no_parts", "splits", "dtype", "rank"],
)
def test_schedule_handler_refuses(
    lengths: tuple[tuple[int, ...], str],
    metadata: tuple[tuple[int, ...], str],
    splits: tuple[tuple[int, ...], str],
) -> None:
    shapes = [jax.ShapeDtypeStruct(dims, jnp.dtype(dtype)) for dims, dtype in (metadata, splits)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected"):
        jax.block_until_ready(
            jax.ffi.ffi_call("jax_flashmla_schedule", shapes)(jnp.zeros(*lengths))
        )


def test_process_decodes_on_after_refusals() -> None:
    operands = dict(OPERANDS, kv_cache=WRONG["page_size"]["kv_cache"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="kv_cache"):
        jax.block_until_ready(
            call_decode(operands, RESULTS, softmax_scale=np.float32(1), causal=True)
        )
    data = inputs.make_inputs(Case(SHAPE, "ragged", "sigma1"))
    decoded = checking.decode(SHAPE, data, "cuda")
    assert checking.judge(decoded, data, SHAPE).faults == ()
