"""Legal but odd data: what it may reach, and what it must not."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla.testing import batches, checking, inputs
from jax_flashmla.testing.cases import PAGE_SIZE, Case, Shape

Fit = Callable[[Shape], Shape]
SHAPES = (
    Shape(6, 1, 16, pages=24),
    Shape(6, 1, 128, pages=24, dtype="float16"),
    Shape(6, 3, 40, pages=24),
    Shape(3, 2, 8, h_kv=2, pages=24, pool_pages=512),
)
VICTIM = 1
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def full(shape: Shape) -> inputs.Inputs:
    """Full requests on pages of their own."""
    return inputs.make_inputs(Case(shape, "full", "sigma1", "in_order"))


def others(decoded: checking.Decoded) -> list[bytes]:
    """Bits of all requests but the victim."""
    return [np.delete(np.asarray(array), VICTIM, axis=0).tobytes() for array in decoded]


def replace_key(data: inputs.Inputs, token: int, column: int, value: float) -> inputs.Inputs:
    """One element of one key of the victim, in all KV heads."""
    page = int(data.block_table[VICTIM, token // PAGE_SIZE])
    pool = data.kv_cache.at[page, token % PAGE_SIZE, :, column].set(value)
    return dataclasses.replace(data, kv_cache=pool)


@with_shape
@pytest.mark.parametrize("column", [3, 300, 570], ids=["latent_left", "latent_right", "rope"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_key_reaches_its_request_only(
    shape: Shape, column: int, value: float, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    data = full(shape)
    clean = checking.decode(shape, data, implementation)
    for token in (0, shape.capacity // 2 + 7, shape.capacity - shape.s_q):
        broken = replace_key(data, token, column, value)
        out, lse = checking.decode(shape, broken, implementation)
        assert others((out, lse)) == others(clean)
        if np.isnan(value):
            assert np.isnan(np.asarray(out[VICTIM], np.float32)).all()
            assert np.isnan(lse[VICTIM]).all()
        else:
            assert not np.isfinite(np.asarray(out[VICTIM], np.float32)).all()


@with_shape
def test_nan_in_the_last_keys_stays_in_its_request(
    shape: Shape, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    data = full(shape)
    clean = checking.decode(shape, data, implementation)
    broken = replace_key(data, shape.capacity - 1, 5, np.nan)
    out, lse = checking.decode(shape, broken, implementation)
    assert others((out, lse)) == others(clean)
    assert np.isnan(np.asarray(out[VICTIM, -1], np.float32)).all()


@with_shape
@pytest.mark.parametrize("entry", [-1, 2147480000, -(2**31), "num_pages"])
def test_bad_entry_inside_the_length_harms_its_request_only(
    shape: Shape, entry: int | str, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    data = full(shape)
    clean = checking.decode(shape, data, implementation)
    bad = shape.pool_pages if entry == "num_pages" else entry
    table = data.block_table.at[VICTIM, jnp.arange(0, shape.pages, 3)].set(bad)
    broken = dataclasses.replace(data, block_table=table)
    assert others(checking.decode(shape, broken, implementation)) == others(clean)


@with_shape
def test_lengths_are_clamped_to_the_table(shape: Shape, fit: Fit, implementation: str) -> None:
    shape = dataclasses.replace(fit(shape), causal=False)
    data = full(shape)
    wild = np.resize([shape.capacity + 1000, 77, -5, 2**31 - 1, -(2**31), 64], shape.batch)
    legal = np.clip(wild, 0, shape.capacity)
    given = dataclasses.replace(data, cache_seqlens=jnp.asarray(wild, jnp.int32))
    meant = dataclasses.replace(data, cache_seqlens=jnp.asarray(legal, jnp.int32))
    decoded = checking.decode(shape, given, implementation)
    assert checking.judge(decoded, meant, shape).faults == ()


@pytest.mark.parametrize("pages", [60_000, 120_000], ids=["over_2^31", "over_2^32"])
def test_large_pools(pages: int, rehearsal: bool, implementation: str) -> None:
    """Pages on both sides of every power of two that an offset could wrap at."""
    pages = 300 if rehearsal else pages
    page_elements = PAGE_SIZE * 576
    near = [2**k // page_elements + step for k in range(20, 33) for step in (-1, 0, 1)]
    chosen = sorted({page for page in [0, *near, pages - 1] if 0 <= page < pages})
    shape = Shape(4, 1, 16, pages=len(chosen), pool_pages=len(chosen))
    small = inputs.make_inputs(Case(shape, "around_pages", "sigma1", "one_page", seed=5))
    order = np.random.default_rng(0)
    lengths = np.full(4, shape.capacity, np.int32) - np.arange(4, dtype=np.int32)
    table = np.stack([order.permutation(len(chosen)) for _ in range(4)]).astype(np.int32)
    batch = batches.lay_out(lengths, table, shape, order)
    small = dataclasses.replace(
        small,
        kv_cache=inputs.make_pool(shape, "sigma1", batch, 5),
        block_table=jnp.asarray(batch.block_table),
        cache_seqlens=jnp.asarray(lengths),
    )
    place = jax.jit(lambda pool, at, keys: pool.at[at].set(keys), donate_argnums=0)
    pool = jnp.full((pages, *small.kv_cache.shape[1:]), np.nan, small.kv_cache.dtype)
    pool = place(pool, jnp.asarray(chosen, jnp.int32), small.kv_cache)
    large = dataclasses.replace(
        small, kv_cache=pool, block_table=jnp.asarray(chosen, jnp.int32)[small.block_table]
    )
    decoded = checking.decode(dataclasses.replace(shape, pool_pages=pages), large, implementation)
    assert checking.judge(decoded, small, shape).faults == ()


@pytest.mark.parametrize(("num_pages", "width"), [(0, 0), (4, 0), (0, 3)])
def test_nothing_to_attend_to(num_pages: int, width: int, implementation: str) -> None:
    out, lse = jax_flashmla.mla_decode(
        jnp.ones((2, 1, 16, 512), jnp.bfloat16),
        jnp.ones((2, 1, 16, 64), jnp.bfloat16),
        jnp.zeros((num_pages, PAGE_SIZE, 1, 576), jnp.bfloat16),
        jnp.zeros((2, width), jnp.int32),
        jnp.asarray([0, 0], jnp.int32),
        softmax_scale=1.0,
        implementation=implementation,
    )
    assert not np.asarray(out, np.float32).any()
    assert np.array_equal(lse, np.full((2, 1, 16), -np.inf, np.float32))


@with_shape
def test_inputs_are_not_written(shape: Shape, fit: Fit, implementation: str) -> None:
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, "ragged", "sigma1"))
    copies = [np.asarray(array).tobytes() for array in jax.tree.leaves(data)]
    jax.block_until_ready(checking.decode(shape, data, implementation))
    assert [np.asarray(array).tobytes() for array in jax.tree.leaves(data)] == copies
