"""Every error of the cache operations' checks: the argument, what was got, what was expected."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from argument_errors import assert_names_argument, name_of

from jax_flashmla import cache

PAGES, ROWS = 5, 3


def zeros(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> np.ndarray:
    return np.zeros(shape, dtype)


def ints(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


APPEND = {
    "cache": zeros(PAGES, 64, 1, 576),
    "latent": zeros(ROWS, 512),
    "rope": zeros(ROWS, 64),
    "slots": ints(ROWS),
    "cos": floats(ROWS, 32),
    "sin": floats(ROWS, 32),
}
GATHER = {"cache": zeros(PAGES, 64, 2, 576), "block_table": ints(2, 4), "cache_seqlens": ints(2)}
POOL = "expected [num_pages, 64, "
CALLS = [
    (cache.append, APPEND, *error)
    for error in [
        ("cache", zeros(PAGES, 64, 576), ValueError, f"got shape [5, 64, 576], {POOL}1, 576]"),
        ("cache", zeros(PAGES, 64, 2, 576), ValueError, f"got shape [5, 64, 2, 576], {POOL}1, 576"),
        ("cache", ints(PAGES, 64, 1, 576), TypeError, "got int32, expected bfloat16, float16 or"),
        ("cache", None, TypeError, "got NoneType, expected a JAX or NumPy array"),
        ("latent", zeros(ROWS, 1, 512), ValueError, "got shape [3, 1, 512], expected [n, 512]"),
        ("latent", zeros(ROWS, 576), ValueError, "got shape [3, 576], expected [n, 512]"),
        ("latent", floats(ROWS, 512), TypeError, "got float32, expected bfloat16"),
        ("rope", zeros(ROWS, 32), ValueError, "got shape [3, 32], expected [3, 64]"),
        ("rope", zeros(2, 64), ValueError, "got shape [2, 64], expected [3, 64]"),
        ("rope", floats(ROWS, 64), TypeError, "got float32, expected bfloat16"),
        ("slots", ints(ROWS, 1), ValueError, "got shape [3, 1], expected [3]"),
        ("slots", np.zeros(ROWS, np.uint8), TypeError, "got uint8, expected int32"),
        ("slots", [0, 1, 2], TypeError, "got list, expected a JAX or NumPy array"),
        ("cos", floats(ROWS, 64), ValueError, "got shape [3, 64], expected [3, 32]"),
        ("sin", zeros(ROWS, 32), TypeError, "got bfloat16, expected float32"),
        ("cos", None, ValueError, "got one of them, expected both or None for both"),
        ("rope_interleave", 1, TypeError, "got 1, expected True or False"),
        ("implementation", "gpu", ValueError, "got 'gpu', expected None, 'cuda' or 'xla'"),
    ]
] + [
    (cache.gather, GATHER, *error)
    for error in [
        ("cache", zeros(PAGES, 32, 1, 576), ValueError, f"got shape [5, 32, 1, 576], {POOL}h_kv"),
        ("block_table", ints(4), ValueError, "got shape [4], expected [b, max_pages_per_seq]"),
        ("block_table", floats(2, 4), TypeError, "got float32, expected int32"),
        ("cache_seqlens", ints(3), ValueError, "got shape [3], expected [2]"),
        ("cache_seqlens", floats(2), TypeError, "got float32, expected int32"),
        ("implementation", "gpu", ValueError, "got 'gpu', expected None, 'cuda' or 'xla'"),
    ]
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


def test_interleaved_pairs_need_angles() -> None:
    plain = {name: x for name, x in APPEND.items() if name not in ("cos", "sin")}
    with pytest.raises(ValueError, match="rope_interleave: got True without cos and sin"):
        cache.append(**plain, rope_interleave=True)


def test_a_pool_whose_slots_leave_int32_is_refused() -> None:
    described = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in APPEND.items()}
    described["cache"] = jax.ShapeDtypeStruct((2**25, 64, 1, 576), jnp.bfloat16)
    with pytest.raises(ValueError, match="cache: got 33554432 pages, expected at most 33554431"):
        jax.eval_shape(lambda arrays: cache.append(**arrays), described)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 4), ValueError, "num_layers: got 0, expected at least 1"),
        ((2, 4.0), TypeError, "num_pages: got 4.0, expected a Python int"),
        ((2**13, 2**13), ValueError, "cache: got 67108864 pages, expected at most 33554431"),
    ],
    ids=["layers", "pages", "too_many"],
)
def test_pool_errors(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        cache.make_pool(*arguments)


def test_pool_dtype_is_checked() -> None:
    with pytest.raises(TypeError, match="dtype: got 'int8', expected bfloat16, float16 or float32"):
        cache.make_pool(1, 1, dtype="int8")


@pytest.mark.parametrize("function", [cache.layer_block_table, cache.layer_slots])
def test_layer_errors(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"(block_table|slots): got float32, expected int32"):
        function(floats(2), 0, 4)
    with pytest.raises(ValueError, match="num_pages: got 0, expected at least 1"):
        function(ints(2), 0, 0)
    with pytest.raises(TypeError, match="num_pages: got a traced value, expected a Python int"):
        jax.eval_shape(lambda pages: function(ints(2), 0, pages), jnp.int32(4))
