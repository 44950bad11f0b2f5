"""Buffers that the Python checks would refuse, straight to the FFI handlers: errors, no faults."""

import re
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


QUERIES: Buffers = {
    "x": ((5, 2, 128), "bfloat16"),
    "query_up": ((128, 3, 192), "bfloat16"),
    "key_up": ((3, 128, 512), "bfloat16"),
    "cos": ((5, 2, 32), "float32"),
    "sin": ((5, 2, 32), "float32"),
    "down": ((128, 576), "bfloat16"),
}
PROJECTED: Buffers = {
    "q_latent": ((5, 2, 3, 512), "bfloat16"),
    "q_rope": ((5, 2, 3, 64), "bfloat16"),
    "projected": ((5, 2, 576), "bfloat16"),
}
# What is wrong, and the buffer that the error names.
WRONG_QUERIES: dict[str, tuple[str, Buffers]] = {
    "float32_x": ("x", {"x": ((5, 2, 128), "float32")}),
    "x_rank": ("x", {"x": ((10, 128), "bfloat16")}),
    "x_columns": ("x", {"x": ((5, 2, 96), "bfloat16"), "query_up": ((96, 3, 192), "bfloat16")}),
    "short_nope": (
        "key_up",
        {"key_up": ((3, 64, 512), "bfloat16"), "query_up": ((128, 3, 128), "bfloat16")},
    ),
    "long_nope": (
        "key_up",
        {"key_up": ((3, 256, 512), "bfloat16"), "query_up": ((128, 3, 320), "bfloat16")},
    ),
    "latent_columns": ("key_up", {"key_up": ((3, 128, 576), "bfloat16")}),
    "key_up_dtype": ("key_up", {"key_up": ((3, 128, 512), "float16")}),
    "query_up_rows": ("query_up", {"query_up": ((64, 3, 192), "bfloat16")}),
    "query_up_heads": ("query_up", {"query_up": ((128, 2, 192), "bfloat16")}),
    "query_up_columns": ("query_up", {"query_up": ((128, 3, 128), "bfloat16")}),
    "query_up_rank": ("query_up", {"query_up": ((128, 576), "bfloat16")}),
    "cos_rows": ("cos", {"cos": ((4, 2, 32), "float32")}),
    "cos_dtype": ("cos", {"cos": ((5, 2, 32), "bfloat16")}),
    "sin_columns": ("sin", {"sin": ((5, 2, 64), "float32")}),
    "q_latent_columns": ("q_latent", {"q_latent": ((5, 2, 3, 576), "bfloat16")}),
    "q_latent_dtype": ("q_latent", {"q_latent": ((5, 2, 3, 512), "float32")}),
    "q_rope_heads": ("q_rope", {"q_rope": ((5, 2, 1, 64), "bfloat16")}),
    "down_rows": ("down", {"down": ((64, 576), "bfloat16")}),
    "down_columns": ("down", {"down": ((128, 512), "bfloat16")}),
    "down_dtype": ("down", {"down": ((128, 576), "float16")}),
    "projected_rows": ("projected", {"projected": ((4, 2, 576), "bfloat16")}),
    "projected_columns": ("projected", {"projected": ((5, 2, 512), "bfloat16")}),
    "too_many_tokens": ("b * s_q", {"x": ((2**20 + 1, 1, 64), "bfloat16")}),
    "no_columns": ("width", {"x": ((5, 2, 0), "bfloat16")}),
    "too_many_columns": ("width", {"x": ((5, 2, 2**20 + 64), "bfloat16")}),
    "too_many_heads": ("h_q", {"key_up": ((2**12 + 1, 128, 512), "bfloat16")}),
}


def call_queries(operands: Buffers, results: Buffers, **attributes: object) -> list[jax.Array]:
    buffers = [jnp.zeros(dims, dtype) for dims, dtype in operands.values()]
    shapes = [jax.ShapeDtypeStruct(dims, jnp.dtype(dtype)) for dims, dtype in results.values()]
    return jax.ffi.ffi_call("jax_flashmla_absorbed_queries", shapes)(*buffers, **attributes)


@pytest.mark.parametrize("wrong", WRONG_QUERIES)
def test_queries_handler_refuses(wrong: str) -> None:
    named, change = WRONG_QUERIES[wrong]
    operands = {name: change.get(name, spec) for name, spec in QUERIES.items()}
    results = {name: change.get(name, spec) for name, spec in PROJECTED.items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{re.escape(named)}: got .*, expected"):
        jax.block_until_ready(call_queries(operands, results, interleave=False))


def without(buffers: Buffers, name: str) -> Buffers:
    return {other: spec for other, spec in buffers.items() if other != name}


@pytest.mark.parametrize(
    ("operands", "results"),
    [
        (QUERIES, without(PROJECTED, "projected")),
        (without(QUERIES, "down"), PROJECTED),
        (QUERIES | {"more": QUERIES["down"]}, PROJECTED | {"more": PROJECTED["projected"]}),
    ],
    ids=["no_result_of_down", "no_down", "down_twice"],
)
def test_queries_handler_refuses_another_number_of_buffers(
    operands: Buffers, results: Buffers
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"operands: got .*, expected 5, or 6"):
        jax.block_until_ready(call_queries(operands, results, interleave=False))


@pytest.mark.parametrize("attributes", [{}, {"interleave": "no"}], ids=["none", "in_words"])
def test_queries_handler_refuses_wrong_attributes(attributes: dict[str, object]) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call_queries(QUERIES, PROJECTED, **attributes))


def test_queries_handler_takes_what_is_right() -> None:
    """What the refusals change is the only thing that is wrong with them."""
    for operands, results in (
        (QUERIES, PROJECTED),
        (without(QUERIES, "down"), without(PROJECTED, "projected")),
    ):
        got = call_queries(operands, results, interleave=False)
        assert not any(np.asarray(x, np.float32).any() for x in got)


def test_process_decodes_on_after_refusals() -> None:
    operands = dict(OPERANDS, kv_cache=WRONG["page_size"]["kv_cache"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="kv_cache"):
        jax.block_until_ready(
            call_decode(operands, RESULTS, softmax_scale=np.float32(1), causal=True)
        )
    data = inputs.make_inputs(Case(SHAPE, "ragged", "sigma1"))
    decoded = checking.decode(SHAPE, data, "cuda")
    assert checking.judge(decoded, data, SHAPE).faults == ()
