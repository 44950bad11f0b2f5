"""Every error of the argument checks: the argument, what was got, what was expected."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from argument_errors import assert_names_argument, name_of

import jax_flashmla

B, S_Q, H_Q, H_KV, PAGES, WIDTH, PARTS = 2, 3, 8, 2, 5, 4, 6


def zeros(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


SHARED = {"block_table": ints(B, WIDTH), "cache_seqlens": ints(B)}
DECODE = SHARED | {
    "q_latent": zeros(B, S_Q, H_Q, 512),
    "q_rope": zeros(B, S_Q, H_Q, 64),
    "kv_cache": zeros(PAGES, 64, H_KV, 576),
    "softmax_scale": 0.1,
}
FLASH = SHARED | {
    "q": zeros(B, S_Q, H_Q, 576),
    "k_cache": zeros(PAGES, 64, H_KV, 576),
    "head_dim_v": 512,
    "tile_scheduler_metadata": ints(PARTS, 8),
    "num_splits": ints(B + 1),
}
METADATA = {"cache_seqlens": ints(B), "num_heads_per_head_k": 12, "num_heads_k": 2}

SHARED_ERRORS = [
    ("block_table", ints(B), ValueError, "got shape [2], expected [2, max_pages_per_seq]"),
    (
        "block_table",
        ints(3, WIDTH),
        ValueError,
        "got shape [3, 4], expected [2, max_pages_per_seq]",
    ),
    ("block_table", zeros(B, WIDTH), TypeError, "got bfloat16, expected int32"),
    ("block_table", None, TypeError, "got NoneType, expected a JAX or NumPy array"),
    ("cache_seqlens", ints(3), ValueError, "got shape [3], expected [2]"),
    ("cache_seqlens", ints(B, 1), ValueError, "got shape [2, 1], expected [2]"),
    ("cache_seqlens", np.zeros(B, np.uint8), TypeError, "got uint8, expected int32"),
    ("cache_seqlens", [1, 2], TypeError, "got list, expected a JAX or NumPy array"),
]
FLAG_ERRORS = [
    ("causal", 1, TypeError, "got 1, expected True or False"),
    ("causal", np.asarray(True), TypeError, "got an array, expected True or False"),
]
SCALE = "expected a Python or NumPy number"
POSITIVE = "expected a finite positive float32"
SCALE_ERRORS = [
    ("softmax_scale", 0.0, ValueError, f"got 0.0, {POSITIVE}"),
    ("softmax_scale", -1, ValueError, f"got -1.0, {POSITIVE}"),
    ("softmax_scale", float("nan"), ValueError, f"got nan, {POSITIVE}"),
    ("softmax_scale", np.float32(np.inf), ValueError, f"got inf, {POSITIVE}"),
    ("softmax_scale", 1e39, ValueError, f"got 1e+39, {POSITIVE}"),
    ("softmax_scale", 1e-46, ValueError, f"got 1e-46, {POSITIVE}"),
    ("softmax_scale", True, TypeError, f"got True, {SCALE}"),
    ("softmax_scale", "0.1", TypeError, f"got '0.1', {SCALE}"),
    ("softmax_scale", np.asarray(0.1), TypeError, f"got an array, {SCALE}"),
]
PARTS_ERRORS = [
    ("num_sm_parts", 0, ValueError, "got 0, expected at least 1"),
    ("num_sm_parts", 2.0, TypeError, "got 2.0, expected a Python int"),
    ("num_sm_parts", True, TypeError, "got True, expected a Python int"),
]
POOL_ERRORS = [
    (
        zeros(PAGES, 64, 576),
        ValueError,
        "got shape [5, 64, 576], expected [num_pages, 64, h_kv, 576]",
    ),
    (zeros(PAGES, 32, 1, 576), ValueError, "got shape [5, 32, 1, 576], expected [num_pages, 64, "),
    (zeros(PAGES, 64, 1, 512), ValueError, "got shape [5, 64, 1, 512], expected [num_pages, 64, "),
    (zeros(PAGES, 64, 1, 576, dtype=jnp.float16), TypeError, "got float16, expected bfloat16"),
    (
        zeros(PAGES, 64, 3, 576),
        ValueError,
        "got 3 KV heads (dimension 2), expected a divisor of the 8",
    ),
    (
        zeros(PAGES, 64, 0, 576),
        ValueError,
        "got 0 KV heads (dimension 2), expected a divisor of the 8",
    ),
]
SCHEDULE_ERRORS = [
    ("tile_scheduler_metadata", ints(8), ValueError, "got shape [8], expected [num_sm_parts, 8]"),
    (
        "tile_scheduler_metadata",
        ints(PARTS, 7),
        ValueError,
        "got shape [6, 7], expected [num_sm_parts",
    ),
    ("tile_scheduler_metadata", ints(0, 8), ValueError, "got 0 rows, expected at least 1"),
    ("tile_scheduler_metadata", zeros(PARTS, 8), TypeError, "got bfloat16, expected int32"),
    ("num_splits", ints(B), ValueError, "got shape [2], expected [3]"),
    ("num_splits", zeros(B + 1), TypeError, "got bfloat16, expected int32"),
]
DECODE_ERRORS = [
    *SHARED_ERRORS,
    *FLAG_ERRORS,
    *SCALE_ERRORS,
    *PARTS_ERRORS,
    *[("kv_cache", *error) for error in POOL_ERRORS],
    (
        "q_latent",
        zeros(B, H_Q, 512),
        ValueError,
        "got shape [2, 8, 512], expected [b, s_q, h_q, 512]",
    ),
    (
        "q_latent",
        zeros(B, S_Q, H_Q, 576),
        ValueError,
        "got shape [2, 3, 8, 576], expected [b, s_q, h_q",
    ),
    (
        "q_latent",
        ints(B, S_Q, H_Q, 512),
        TypeError,
        "got int32, expected bfloat16, float16 or float32",
    ),
    (
        "q_rope",
        zeros(B, S_Q, H_Q, 63),
        ValueError,
        "got shape [2, 3, 8, 63], expected [2, 3, 8, 64]",
    ),
    ("q_rope", zeros(B, 1, H_Q, 64), ValueError, "got shape [2, 1, 8, 64], expected [2, 3, 8, 64]"),
    (
        "q_rope",
        zeros(B, S_Q, H_Q, 64, dtype=jnp.float32),
        TypeError,
        "got float32, expected bfloat16",
    ),
    ("softmax_scale", None, TypeError, f"got None, {SCALE}"),
    ("implementation", "gpu", ValueError, "got 'gpu', expected None, 'cuda' or 'xla'"),
    ("schedule", 3, TypeError, "got int, expected the pair that get_mla_metadata returns"),
    (
        "schedule",
        (ints(PARTS, 8),),
        TypeError,
        "got tuple, expected the pair that get_mla_metadata",
    ),
]
FLASH_ERRORS = [
    *SHARED_ERRORS,
    *FLAG_ERRORS,
    *SCALE_ERRORS,
    *SCHEDULE_ERRORS,
    *[("k_cache", *error) for error in POOL_ERRORS],
    (
        "q",
        zeros(B, S_Q, H_Q, 512),
        ValueError,
        "got shape [2, 3, 8, 512], expected [b, s_q, h_q, 576]",
    ),
    (
        "q",
        zeros(B, S_Q, H_Q, 576, dtype=jnp.int8),
        TypeError,
        "got int8, expected bfloat16, float16 or",
    ),
    ("head_dim_v", 576, ValueError, "got 576, expected 512"),
    ("head_dim_v", 512.0, TypeError, "got 512.0, expected a Python int"),
    ("num_splits", None, ValueError, "got one of them, expected both or None for both"),
]
METADATA_ERRORS = [
    *PARTS_ERRORS,
    ("cache_seqlens", ints(B, 1), ValueError, "got shape [2, 1], expected [b]"),
    ("cache_seqlens", np.zeros(B, np.float32), TypeError, "got float32, expected int32"),
    ("cache_seqlens", 7, TypeError, "got int, expected a JAX or NumPy array"),
    ("num_heads_per_head_k", 0, ValueError, "got 0, expected at least 1"),
    ("num_heads_per_head_k", 1.5, TypeError, "got 1.5, expected a Python int"),
    ("num_heads_k", -1, ValueError, "got -1, expected at least 1"),
    ("num_heads_k", None, TypeError, "got None, expected a Python int"),
]
CALLS = [
    *[(jax_flashmla.mla_decode, DECODE, *error) for error in DECODE_ERRORS],
    *[(jax_flashmla.flash_mla_with_kvcache, FLASH, *error) for error in FLASH_ERRORS],
    *[(jax_flashmla.get_mla_metadata, METADATA, *error) for error in METADATA_ERRORS],
]


@pytest.mark.parametrize(
    ("function", "valid", "argument", "value", "error", "text"), CALLS, ids=name_of
)
def test_error_names_argument_got_and_expected(
    function: Callable,
    valid: dict[str, Any],
    argument: str,
    value: object,
    error: type[Exception],
    text: str,
) -> None:
    assert_names_argument(function, valid | {argument: value}, argument, error, text)


@pytest.mark.parametrize(
    ("function", "valid", "argument"),
    [
        (jax_flashmla.mla_decode, DECODE, "softmax_scale"),
        (jax_flashmla.mla_decode, DECODE, "causal"),
        (jax_flashmla.mla_decode, DECODE, "num_sm_parts"),
        (jax_flashmla.flash_mla_with_kvcache, FLASH, "softmax_scale"),
        (jax_flashmla.flash_mla_with_kvcache, FLASH, "causal"),
        (jax_flashmla.flash_mla_with_kvcache, FLASH, "head_dim_v"),
        (jax_flashmla.get_mla_metadata, METADATA, "num_heads_k"),
        (jax_flashmla.get_mla_metadata, METADATA, "num_heads_per_head_k"),
        (jax_flashmla.get_mla_metadata, METADATA, "num_sm_parts"),
    ],
    ids=name_of,
)
def test_a_traced_static_argument_is_named(
    function: Callable, valid: dict[str, Any], argument: str
) -> None:
    with pytest.raises(TypeError, match=f"{argument}: got a traced value, expected"):
        jax.eval_shape(lambda value: function(**valid | {argument: value}), jnp.float32(1))


def test_num_sm_parts_has_to_be_the_one_of_the_schedule() -> None:
    schedule = ints(PARTS, 8), ints(B + 1)
    with pytest.raises(ValueError, match="num_sm_parts: got 7, expected the schedule's 6"):
        jax_flashmla.mla_decode(**DECODE, schedule=schedule, num_sm_parts=7)


@pytest.mark.parametrize("scale", [1, 0.25, np.float32(0.25), np.float64(0.25), np.int32(2)])
def test_python_and_numpy_numbers_are_scales(scale: float) -> None:
    shapes = jax.eval_shape(lambda: jax_flashmla.mla_decode(**DECODE | {"softmax_scale": scale}))
    assert [x.shape for x in shapes] == [(B, S_Q, H_Q, 512), (B, S_Q, H_Q)]


def test_numpy_arrays_are_arrays() -> None:
    out, lse = jax_flashmla.mla_decode(**DECODE)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_errors_come_when_the_program_is_traced() -> None:
    with pytest.raises(ValueError, match="q_rope: got shape"):
        jax.jit(jax_flashmla.mla_decode, static_argnames="softmax_scale").trace(
            **DECODE | {"q_rope": zeros(B, S_Q, H_Q, 63)}
        )
