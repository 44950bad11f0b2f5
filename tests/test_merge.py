"""The merge of partial results: against float64, empty partials, transformations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import merge_partials
from jax_flashmla.testing import cache_oracle

DTYPES = ("bfloat16", "float16", "float32")


def partials(
    n: int, rows: int, d: int, *, dtype: str = "float32", sigma: float = 2.0, empty: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Random partials; a share of them is empty, with NaN in their out."""
    rng = np.random.default_rng(n + rows + d)
    outs = rng.standard_normal((n, rows, d)).astype(np.float32)
    lses = (sigma * rng.standard_normal((n, rows))).astype(np.float32)
    hollow = rng.uniform(size=(n, rows)) < empty
    hollow[:, -1] = True  # one row is empty everywhere
    outs[hollow], lses[hollow] = np.nan, -np.inf
    return np.asarray(outs.astype(jnp.dtype(dtype))), lses


SIZES = ((1, 3, 8), (2, 130, 512), (5, 7, 24), (64, 9, 512), (200, 3, 16), (3, 4, 7))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_the_softmax_over_all_keys(size: tuple[int, int, int], dtype: str) -> None:
    outs, lses = partials(*size, dtype=dtype)
    out, lse = merge_partials(outs, lses)
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.float32)
    exact_out, exact_lse = cache_oracle.merge(outs, lses, dtype)
    assert exact_out.faults(out) == 0
    assert exact_lse.faults(lse) == 0


def test_a_mean_is_not_good_enough() -> None:
    outs, lses = partials(4, 20, 64, empty=0)
    exact, _ = cache_oracle.merge(outs, lses, "float32")
    assert exact.faults(outs.mean(axis=0)) > 1000


def test_the_oracle_is_attention_over_the_union_of_keys() -> None:
    rng = np.random.default_rng(5)
    logits, values = rng.normal(0, 3, (2, 30)), rng.standard_normal((30, 8))
    parts = np.array_split(np.arange(30), [4, 5, 20])
    lses = np.stack([np.log(np.exp(logits[:, p]).sum(axis=1)) for p in parts])
    outs = np.stack(
        [np.exp(logits[:, p] - lses[k][:, None]) @ values[p] for k, p in enumerate(parts)]
    )
    out, lse = cache_oracle.merge(outs, lses, "float32")
    whole = np.exp(logits)
    np.testing.assert_allclose(out.values, whole @ values / whole.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(lse.values, np.log(whole.sum(axis=1)))


@pytest.mark.parametrize("level", [-3e4, 0.0, 3e4])
def test_the_level_of_the_logits_does_not_matter(level: float) -> None:
    outs, lses = partials(3, 11, 16)
    moved = lses + np.float32(level)
    out, lse = merge_partials(outs, moved)
    exact_out, exact_lse = cache_oracle.merge(outs, moved, "float32")
    assert exact_out.faults(out) == exact_lse.faults(lse) == 0


def test_all_empty_gives_zero_and_minus_infinity() -> None:
    outs = np.full((4, 2, 3, 8), np.nan, np.float32)
    out, lse = merge_partials(outs, np.full((4, 2, 3), -np.inf, np.float32))
    np.testing.assert_array_equal(out, np.zeros((2, 3, 8)))
    np.testing.assert_array_equal(lse, np.full((2, 3), -np.inf))


def test_what_is_not_empty_is_not_hidden() -> None:
    outs = np.ones((2, 3, 8), np.float32)
    outs[0, 0, 5] = np.nan
    lses = np.float32([[0, np.nan, np.inf], [200, 0, 0]])
    out, lse = merge_partials(outs, lses)
    assert np.isnan(out[0]).tolist() == [False] * 5 + [True] + [False] * 2
    assert np.isnan(out[1:]).all()
    assert np.isnan(lse).tolist() == [False, True, True]


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_result_has_the_dtype_asked_for(given: str, asked: str) -> None:
    outs, lses = partials(3, 5, 16, dtype=given)
    out, _ = merge_partials(outs, lses, dtype=asked)
    assert out.dtype == jnp.dtype(asked)
    assert cache_oracle.merge(outs, lses, asked)[0].faults(out) == 0


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 8), (3, 8)], ids=str)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_no_partials_no_rows_no_columns(shape: tuple[int, ...], wrap: Callable) -> None:
    out, lse = wrap(merge_partials)(jnp.ones(shape), jnp.zeros(shape[:-1]))
    assert (out.shape, lse.shape) == (shape[1:], shape[1:-1])
    np.testing.assert_allclose(lse, np.log(shape[0]) if shape[0] else -np.inf, rtol=1e-6)
    np.testing.assert_array_equal(out, 1.0 if shape[0] else 0.0)


def test_decode_of_two_halves_merges_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 1, 4, 576)).astype(np.float32)
    pool = rng.standard_normal((4, 64, 1, 576)).astype(np.float32)
    table, lengths = np.int32([[0, 1], [2, 3]]), np.int32([100, 64])

    def decode(columns: slice, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        arrays = q[..., :512], q[..., 512:], pool, table[:, columns], lengths
        return jax_flashmla.mla_decode(*arrays, softmax_scale=0.1)

    parts = [decode(slice(0, 1), np.minimum(lengths, 64)), decode(slice(1, 2), lengths - 64)]
    merged = merge_partials(*map(jnp.stack, zip(*parts, strict=True)))
    for got, expected in zip(merged, decode(slice(None), lengths), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_axes", [(0, 0), (2, 1), (None, 0), (1, None)], ids=str)
def test_vmap(in_axes: tuple[int | None, int | None]) -> None:
    outs, lses = partials(3, 5, 16, empty=0)
    stacked = [
        np.stack([x, 2 * x], axis) if axis is not None else x
        for x, axis in zip((outs, lses), in_axes, strict=True)
    ]
    out, lse = jax.jit(jax.vmap(merge_partials, in_axes))(*stacked)
    for i in range(2):
        one = [x if a is None else (i + 1) * x for x, a in zip((outs, lses), in_axes, strict=True)]
        for got, expected in zip((out[i], lse[i]), merge_partials(*one), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_derivatives_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="inference-only: merge_partials has no deriv"):
        jax.grad(lambda x: merge_partials(x, jnp.zeros((2, 3)))[0].sum())(jnp.ones((2, 3, 8)))


ERRORS = {
    "outs_rank": ("outs", jnp.ones(8), ValueError, r"got shape \[8\], expected \[n, ..., d\]"),
    "outs_dtype": ("outs", jnp.ones((2, 3, 8), jnp.int32), TypeError, "got int32, expected bfl"),
    "lses_shape": ("lses", jnp.ones((2, 4)), ValueError, r"got shape \[2, 4\], expected \[2, 3\]"),
    "lses_dtype": (
        "lses",
        jnp.ones((2, 3), jnp.bfloat16),
        TypeError,
        "got bfloat16, expected float32",
    ),
    "dtype": ("dtype", "int8", TypeError, "got 'int8', expected bfloat16, float16 or float32"),
    "no_dtype": ("dtype", "bf17", TypeError, "got 'bf17', expected bfloat16, float16 or float32"),
    "implementation": ("implementation", "gpu", ValueError, "got 'gpu', expected None, 'cuda'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_got_and_expected(name: str) -> None:
    argument, value, error, text = ERRORS[name]
    arguments = {"outs": jnp.ones((2, 3, 8)), "lses": jnp.zeros((2, 3))}
    with pytest.raises(error, match=f"{argument}: {text}"):
        merge_partials(**arguments | {argument: value})
