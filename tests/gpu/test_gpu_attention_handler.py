"""What the handler of the attention in one call refuses: malformed buffers cause no faults."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import _ffi

PARTS = 3
Buffers = Mapping[str, tuple[tuple[int, ...], str]]

# A low rank of 128 columns, two requests of two tokens, three heads.
OPERANDS: Buffers = {
    "source": ((2, 2, 704), "bfloat16"),
    "query_up": ((128, 3, 192), "bfloat16"),
    "key_up": ((3, 128, 512), "bfloat16"),
    "query_norm": ((128,), "bfloat16"),
    "latent_norm": ((512,), "bfloat16"),
    "cos": ((2, 2, 32), "float32"),
    "sin": ((2, 2, 32), "float32"),
    "slots": ((2, 2), "int32"),
    "kv_cache": ((8, 64, 1, 576), "bfloat16"),
    "block_table": ((2, 4), "int32"),
    "cache_seqlens": ((2,), "int32"),
    "tile_scheduler_metadata": ((PARTS, 8), "int32"),
    "num_splits": ((3,), "int32"),
}
RESULTS: Buffers = {
    "out": ((2, 2, 3, 512), "bfloat16"),
    "kv_cache": ((8, 64, 1, 576), "bfloat16"),
    "q_latent": ((2, 2, 3, 512), "bfloat16"),
    "q_rope": ((2, 2, 3, 64), "bfloat16"),
    "between": ((2, 2, 128), "bfloat16"),
    "lse": ((2, 2, 3), "float32"),
    "partial_out": ((2 * PARTS, 1, 6, 512), "float16"),
    "partial_rows": ((2 * PARTS, 1, 6, 4), "float32"),
}
# Without a low rank: down takes the place of query_norm, what it gives that of the normed rows.
PLAIN: Buffers = {
    {"query_norm": "down"}.get(name, name): {
        "source": ((2, 2, 128), "bfloat16"),
        "query_norm": ((128, 576), "bfloat16"),
    }.get(name, spec)
    for name, spec in OPERANDS.items()
}
PLAIN_RESULTS: Buffers = {**RESULTS, "between": ((2, 2, 576), "bfloat16")}

# What is wrong, and the name that the error begins with.
WRONG: dict[str, tuple[str, Buffers]] = {
    "source_dtype": ("source", {"source": ((2, 2, 704), "float16")}),
    "source_rank": ("source", {"source": ((4, 704), "bfloat16")}),
    "source_columns": ("source", {"source": ((2, 2, 700), "bfloat16")}),
    "source_without_a_rank": ("source", {"source": ((2, 2, 576), "bfloat16")}),
    "too_few_columns": ("source", {"source": ((2, 2, 512), "bfloat16")}),
    "a_rank_above_4096": ("source", {"source": ((2, 2, 4680), "bfloat16")}),
    "source_requests": ("source", {"source": ((1, 2, 704), "bfloat16")}),
    "source_queries": ("source", {"source": ((2, 1, 704), "bfloat16")}),
    "slots_dtype": ("slots", {"slots": ((2, 2), "float32")}),
    "slots_rank": ("slots", {"slots": ((4,), "int32")}),
    "latent_norm_columns": ("latent_norm", {"latent_norm": ((576,), "bfloat16")}),
    "latent_norm_dtype": ("latent_norm", {"latent_norm": ((512,), "float32")}),
    "query_norm_columns": ("query_norm", {"query_norm": ((64,), "bfloat16")}),
    "query_norm_dtype": ("query_norm", {"query_norm": ((128,), "float16")}),
    "cos_requests": ("cos", {"cos": ((1, 2, 32), "float32")}),
    "cos_dtype": ("cos", {"cos": ((2, 2, 32), "bfloat16")}),
    "sin_columns": ("sin", {"sin": ((2, 2, 64), "float32")}),
    "page_size": ("kv_cache", {"kv_cache": ((8, 32, 1, 576), "bfloat16")}),
    "kv_columns": ("kv_cache", {"kv_cache": ((8, 64, 1, 512), "bfloat16")}),
    "kv_heads": ("kv_cache", {"kv_cache": ((8, 64, 2, 576), "bfloat16")}),
    "kv_rank": ("kv_cache", {"kv_cache": ((8, 64, 576), "bfloat16")}),
    "normed_requests": ("normed", {"between": ((1, 2, 128), "bfloat16")}),
    "normed_columns": ("normed", {"between": ((2, 2, 64), "bfloat16")}),
    "normed_dtype": ("normed", {"between": ((2, 2, 128), "float32")}),
    "query_up_rows": ("query_up", {"query_up": ((64, 3, 192), "bfloat16")}),
    "query_up_heads": ("query_up", {"query_up": ((128, 2, 192), "bfloat16")}),
    "key_up_columns": ("key_up", {"key_up": ((3, 128, 576), "bfloat16")}),
    "short_nope": ("key_up", {"key_up": ((3, 64, 512), "bfloat16")}),
    "key_up_dtype": ("key_up", {"key_up": ((3, 128, 512), "float16")}),
    "q_latent_heads": ("q_latent", {"q_latent": ((2, 2, 2, 512), "bfloat16")}),
    "q_rope_columns": ("q_rope", {"q_rope": ((2, 2, 3, 32), "bfloat16")}),
    "table_requests": ("block_table", {"block_table": ((3, 4), "int32")}),
    "table_dtype": ("block_table", {"block_table": ((2, 4), "float32")}),
    "seqlens_requests": ("cache_seqlens", {"cache_seqlens": ((1,), "int32")}),
    "metadata_columns": (
        "tile_scheduler_metadata",
        {"tile_scheduler_metadata": ((PARTS, 7), "int32")},
    ),
    "no_parts": ("num_sm_parts", {"tile_scheduler_metadata": ((0, 8), "int32")}),
    "splits_length": ("num_splits", {"num_splits": ((2,), "int32")}),
    "small_out": ("out", {"out": ((1, 2, 3, 512), "bfloat16")}),
    "out_dtype": ("out", {"out": ((2, 2, 3, 512), "float32")}),
    "small_lse": ("lse", {"lse": ((2, 2, 2), "float32")}),
    "small_workspace": ("partial_out", {"partial_out": ((5, 1, 6, 512), "float16")}),
    "small_row_workspace": ("partial_rows", {"partial_rows": ((6, 1, 5, 4), "float32")}),
}
WRONG_PLAIN: dict[str, tuple[str, Buffers]] = {
    "x_dtype": ("x", {"source": ((2, 2, 128), "float32")}),
    "x_columns": ("x", {"source": ((2, 2, 96), "bfloat16")}),
    "x_rank": ("x", {"source": ((4, 128), "bfloat16")}),
    "x_requests": ("cos", {"source": ((3, 2, 128), "bfloat16")}),
    "down_rows": ("down", {"down": ((64, 576), "bfloat16")}),
    "down_columns": ("down", {"down": ((128, 512), "bfloat16")}),
    "down_dtype": ("down", {"down": ((128, 576), "float16")}),
    "projected_requests": ("projected", {"between": ((3, 2, 576), "bfloat16")}),
    "too_few_projected": ("source", {"between": ((1, 2, 576), "bfloat16")}),
    "projected_columns": ("source", {"between": ((2, 2, 704), "bfloat16")}),
    "projected_dtype": ("source", {"between": ((2, 2, 576), "float16")}),
    "page_size": ("kv_cache", {"kv_cache": ((8, 32, 1, 576), "bfloat16")}),
}
ATTRIBUTES = {
    "softmax_scale": np.float32(1),
    "norm_eps": np.float32(1e-6),
    "interleave": False,
}


@pytest.fixture(autouse=True)
def only_on_a_gpu(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the handlers are the GPU's")


def call(
    operands: Buffers, results: Buffers, *, in_place: bool = True, **attributes: object
) -> list[jax.Array]:
    """Calls the handler with zeros, but for a schedule of empty requests."""
    buffers = {name: jnp.zeros(*spec) for name, spec in operands.items()}
    schedule = jax_flashmla.get_mla_metadata(jnp.zeros(2, jnp.int32), 6, 1, num_sm_parts=PARTS)
    for name, array in schedule._asdict().items():
        if (array.shape, array.dtype) == (buffers[name].shape, buffers[name].dtype):
            buffers[name] = array
    shapes = [jax.ShapeDtypeStruct(dims, jnp.dtype(dtype)) for dims, dtype in results.values()]
    aliases = {list(operands).index("kv_cache"): list(results).index("kv_cache")}
    target = _ffi.ABSORBED_ATTENTION_TARGET
    made = jax.ffi.ffi_call(target, shapes, input_output_aliases=aliases if in_place else {})
    return jax.block_until_ready(made(*buffers.values(), **attributes))


def assert_refused(
    wrong: tuple[str, Buffers], operands: Buffers, results: Buffers, *, low_rank: bool
) -> None:
    named, change = wrong
    given, made = (
        {name: change.get(name, spec) for name, spec in buffers.items()}
        for buffers in (operands, results)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"\b{named}: got .*, expected"):
        call(given, made, **ATTRIBUTES, low_rank=low_rank)


@pytest.mark.parametrize("wrong", WRONG)
def test_of_a_low_rank_it_refuses(wrong: str) -> None:
    assert_refused(WRONG[wrong], OPERANDS, RESULTS, low_rank=True)


@pytest.mark.parametrize("wrong", WRONG_PLAIN)
def test_without_a_low_rank_it_refuses(wrong: str) -> None:
    assert_refused(WRONG_PLAIN[wrong], PLAIN, PLAIN_RESULTS, low_rank=False)


@pytest.mark.parametrize("low_rank", [False, True])
def test_operands_of_the_other_form_are_refused(low_rank: bool) -> None:
    operands, results = (PLAIN, PLAIN_RESULTS) if low_rank else (OPERANDS, RESULTS)
    assert_refused(("source", {}), operands, results, low_rank=low_rank)


def test_a_pool_that_is_not_written_in_place_is_refused() -> None:
    message = re.escape("written_cache: got other memory, expected that of kv_cache")
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(OPERANDS, RESULTS, in_place=False, **ATTRIBUTES, low_rank=True)


@pytest.mark.parametrize(
    "attributes",
    [{}, ATTRIBUTES, ATTRIBUTES | {"low_rank": True, "softmax_scale": "1"}],
    ids=["none", "one_missing", "scale_in_words"],
)
def test_wrong_attributes_are_refused(attributes: dict[str, object]) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError):
        call(OPERANDS, RESULTS, **attributes)


@pytest.mark.parametrize("low_rank", [False, True])
def test_it_takes_what_is_right(low_rank: bool) -> None:
    """What the refusals change is the only thing that is wrong with them."""
    operands, results = (OPERANDS, RESULTS) if low_rank else (PLAIN, PLAIN_RESULTS)
    out, cache, *_ = call(operands, results, **ATTRIBUTES, low_rank=low_rank)
    assert not np.float32(out).any()
    assert not np.float32(cache).any()
