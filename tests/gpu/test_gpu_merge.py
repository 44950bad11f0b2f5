"""The merge on the GPU against float64: shapes, dtypes, empty partials, graphs, repeats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import merge_partials
from jax_flashmla.testing import cache_oracle
from jax_flashmla.testing.cache_oracle import bits

DTYPES = ("bfloat16", "float16", "float32")
# n, rows, d: teams of 1, 2, 4 and 8 warps, part batches, columns that do not fill a warp.
SIZES = (
    (1, 1, 8),
    (2, 5, 512),
    (3, 33, 24),
    (4, 16, 512),
    (5, 7, 64),
    (8, 40, 512),
    (9, 3, 128),
    (16, 20, 512),
    (17, 65, 72),
    (63, 2, 512),
    (64, 16, 512),
    (130, 9, 256),
)


@pytest.fixture
def merge(implementation: str) -> functools.partial:
    return functools.partial(merge_partials, implementation=implementation)


def partials(
    n: int, rows: int, d: int, dtype: str, *, empty: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random partials; a share of them is empty, with NaN in their out; one row wholly so."""
    rng = np.random.default_rng([n, rows, d, seed])
    outs = rng.standard_normal((n, rows, d)).astype(np.float32)
    lses = (3 * rng.standard_normal((n, rows))).astype(np.float32)
    hollow = rng.uniform(size=(n, rows)) < empty
    hollow[:, -1] = True
    outs[hollow], lses[hollow] = np.nan, -np.inf
    return np.asarray(outs.astype(jnp.dtype(dtype))), lses


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_the_softmax_over_all_keys(
    size: tuple[int, int, int], dtype: str, merge: functools.partial
) -> None:
    outs, lses = partials(*size, dtype)
    got = merge(outs, lses)
    for result, exact in zip(got, cache_oracle.merge(outs, lses, dtype), strict=True):
        assert exact.faults(result) == 0


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_result_has_the_dtype_asked_for(given: str, asked: str, merge: functools.partial) -> None:
    outs, lses = partials(6, 50, 64, given)
    out, _ = merge(outs, lses, dtype=asked)
    assert out.dtype == jnp.dtype(asked)
    assert cache_oracle.merge(outs, lses, asked)[0].faults(out) == 0


@pytest.mark.parametrize("n", [1, 4, 5, 12, 40])
@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_level_and_spread_of_the_logits(n: int, level: float, merge: functools.partial) -> None:
    """Far apart, so that most weights vanish, and far from zero."""
    outs, lses = partials(n, 30, 64, "float32")
    moved = np.float32(40) * lses + np.float32(level)
    for result, exact in zip(
        merge(outs, moved), cache_oracle.merge(outs, moved, "float32"), strict=True
    ):
        assert exact.faults(result) == 0


@pytest.mark.parametrize("n", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_empty_gives_zero_and_minus_infinity(
    n: int, dtype: str, merge: functools.partial
) -> None:
    outs = jnp.full((n, 70, 512), jnp.nan, dtype)
    out, lse = merge(outs, jnp.full((n, 70), -jnp.inf))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_what_is_not_empty_is_not_hidden(n: int, merge: functools.partial) -> None:
    outs = np.ones((n, 4, 16), np.float32)
    lses = np.zeros((n, 4), np.float32)
    outs[0, 0, 5], lses[1, 1], lses[n - 1, 2], lses[:, 3] = np.nan, np.nan, np.inf, np.inf
    out, lse = map(np.asarray, merge(outs, lses))
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [5]
    assert np.isnan(out[1:]).all()
    assert np.isnan(lse).tolist() == [False, True, True, True]


def test_many_rows(merge: functools.partial, rehearsal: bool) -> None:
    outs, lses = partials(3, 50 if rehearsal else 20_000, 512, "bfloat16")
    got = jax.jit(merge)(outs, lses)
    kept = slice(None, None, 97)
    exact = cache_oracle.merge(outs[:, kept], lses[:, kept], "bfloat16")
    for result, truth in zip(got, exact, strict=True):
        assert truth.faults(result[kept]) == 0
    assert not np.isnan(np.asarray(got[0], np.float32)).any()


def test_eight_merges_in_one_program_are_right_at_every_replay(merge: functools.partial) -> None:
    @jax.jit
    def chain(outs: jax.Array, lses: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        return [merge(outs[: n + 1], lses[: n + 1]) for n in range(8)]

    for seed in range(4):
        outs, lses = partials(8, 30, 512, "bfloat16", seed=seed)
        for n, got in enumerate(chain(outs, lses)):
            expected = cache_oracle.merge(outs[: n + 1], lses[: n + 1], "bfloat16")
            for result, exact in zip(got, expected, strict=True):
                assert exact.faults(result) == 0


def test_repeats_give_the_same_bits(merge: functools.partial) -> None:
    outs, lses = map(jnp.asarray, partials(40, 300, 512, "float32"))
    first = [bits(x) for x in merge(outs, lses)]
    for _ in range(20):
        for got, expected in zip(merge(outs, lses), first, strict=True):
            np.testing.assert_array_equal(bits(got), expected)


def test_vmap_is_one_merge_of_more_rows(merge: functools.partial) -> None:
    outs, lses = partials(5, 12, 64, "float32")
    out, lse = jax.jit(jax.vmap(merge, (1, 1)))(outs.reshape(5, 3, 4, 64), lses.reshape(5, 3, 4))
    for got, expected in zip((out, lse), merge(outs, lses), strict=True):
        np.testing.assert_array_equal(bits(got).reshape(expected.shape), bits(expected))


def test_kernel_runs_by_default_for_columns_in_eights(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the kernel is the GPU's")
    outs, lses = map(jnp.asarray, partials(2, 3, 512, "float32"))
    assert "jax_flashmla_merge" in jax.jit(merge_partials).lower(outs, lses).as_text()
    with pytest.warns(UserWarning, match="d = 7 is not a multiple of 8"):
        out, _ = merge_partials(outs[..., :7], lses)
    assert (
        cache_oracle.merge(np.asarray(outs[..., :7]), np.asarray(lses), "float32")[0].faults(out)
        == 0
    )
