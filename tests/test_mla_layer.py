"""The decode layer: padded rows, several tokens per step, memory, what it refuses."""

import functools
import re
from collections.abc import Callable
from typing import Any

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import cache, mla

HF = dense_stack.hf_config("deepseek_v3", num_hidden_layers=1, rope_scaling=dense_stack.YARN)
CONFIG = mla.MLAConfig.from_hf(HF)
PAGES, WIDTH = 8, 3
decode = jax.jit(mla.decode, static_argnums=1)


@pytest.fixture(scope="module")
def weights() -> mla.MLAWeights:
    return mla.load_weights(
        dense_stack.random_tensors(HF), CONFIG, prefix="model.layers.0.self_attn."
    )


def states(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, HF["hidden_size"]))


def place(lengths: list[int], s_q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Table, lengths and slots of requests on pages of their own; length 0 pads the batch."""
    table = np.full((len(lengths), WIDTH), -1, np.int32)
    slots = np.full((len(lengths), s_q), -1, np.int32)
    free = iter(np.random.default_rng(0).permutation(PAGES))
    for row, length in enumerate(lengths):
        pages = -(-length // 64)
        table[row, :pages] = [next(free) for _ in range(pages)]
        for j in range(s_q):
            if (at := length - s_q + j) >= 0:
                slots[row, j] = table[row, at // 64] * 64 + at % 64
    return table, np.array(lengths, np.int32), slots


def test_rows_that_pad_the_batch_change_nothing(weights: mla.MLAWeights) -> None:
    """Their hidden states are NaN here; result 0, pool untouched, other rows as without them."""
    x = states(3, 1).at[1].set(jnp.nan)
    table, lengths, slots = place([70, 0, 5], 1)
    start = jax.random.normal(jax.random.key(9), (PAGES, 64, 1, 576))
    step = mla.decode_step(CONFIG, table, lengths, slots)
    y, pool = decode(weights, CONFIG, x, start, step)
    alone = mla.decode_step(CONFIG, table[::2], lengths[::2], slots[::2])
    expected, expected_pool = decode(weights, CONFIG, x[::2], start, alone)
    assert (np.asarray(y[1]) == 0).all()
    np.testing.assert_allclose(y[::2], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pool, expected_pool)
    written = (np.asarray(pool) != np.asarray(start)).any(axis=(2, 3))
    assert sorted(np.flatnonzero(written)) == sorted(slots[::2].ravel())


def test_a_single_row_gives_what_it_gives_in_a_batch(weights: mla.MLAWeights) -> None:
    x = states(2, 1)
    table, lengths, slots = place([70, 5], 1)
    start = jax.random.normal(jax.random.key(9), (PAGES, 64, 1, 576))
    expected, expected_pool = decode(
        weights, CONFIG, x, start, mla.decode_step(CONFIG, table, lengths, slots)
    )
    pool, parts = start, []
    for i in range(2):
        step = mla.decode_step(CONFIG, *(array[i : i + 1] for array in (table, lengths, slots)))
        part, pool = decode(weights, CONFIG, x[i : i + 1], pool, step)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pool, expected_pool, rtol=1e-5, atol=1e-6)


def test_a_devices_single_row_gives_what_it_gives_in_a_batch(weights: mla.MLAWeights) -> None:
    x = states(2, 1)
    table, lengths, slots = np.array([[0, -1], [0, -1]]), np.array([5, 9]), np.array([[4], [8]])
    pool = jax.random.normal(jax.random.key(9), (2, 64, 1, 576))  # a page for each device

    def run(x: jax.Array, pool: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mla.decode(weights, CONFIG, x, pool, mla.decode_step(CONFIG, *arrays))

    arrays = [jnp.asarray(array, jnp.int32) for array in (table, lengths, slots)]
    spec = jax.P("data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(x, pool, *arrays)
    table[1, 0], slots[1] = 1, 64 + 8  # the same pages in one pool
    whole = [jnp.asarray(array, jnp.int32) for array in (table, lengths, slots)]
    expected = jax.jit(run)(x, pool, *whole)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_no_dense_product_has_a_single_row(weights: mla.MLAWeights) -> None:
    """XLA would not take it for a matrix product."""
    step = mla.decode_step(CONFIG, *place([70], 1))
    pool = cache.make_pool(1, PAGES, dtype=jnp.float32)
    text = decode.lower(weights, CONFIG, states(1, 1), pool, step).as_text()
    hidden, rank = HF["hidden_size"], HF["q_lora_rank"]
    for columns in (hidden, rank):  # of what goes into the products with down and query_up
        assert re.search(rf"dot_general .*: \(tensor<2x1x{columns}xf32>", text)
    assert re.search(rf"dot_general .*-> tensor<2x1x{hidden}xf32>", text)
    assert not re.search(rf"dot_general .*: \(tensor<1x1x({hidden}|{rank})xf32>", text)
    assert not re.search(rf"dot_general .*-> tensor<1x1x{hidden}xf32>", text)


def test_several_tokens_at_once_are_one_after_the_other(weights: mla.MLAWeights) -> None:
    x = states(2, 3)
    table, lengths, slots = place([66, 10], 3)
    start = jax.random.normal(jax.random.key(9), (PAGES, 64, 1, 576))
    step = mla.decode_step(CONFIG, table, lengths, slots)
    y, pool = decode(weights, CONFIG, x, start, step)
    one_by_one, parts = start, []
    for j in range(3):
        step = mla.decode_step(CONFIG, table, lengths - 2 + j, slots[:, j : j + 1])
        part, one_by_one = decode(weights, CONFIG, x[:, j : j + 1], one_by_one, step)
        parts.append(part)
    np.testing.assert_allclose(y, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pool, one_by_one, rtol=1e-4, atol=1e-5)


def test_layers_of_a_flat_pool_keep_apart(weights: mla.MLAWeights) -> None:
    table, lengths, slots = place([70, 5], 1)
    step = mla.decode_step(CONFIG, table, lengths, slots)
    start = jax.random.normal(jax.random.key(9), (3 * PAGES, 64, 1, 576))
    _, pool = decode(weights, CONFIG, states(2, 1), start, step.at_layer(1, PAGES))
    changed = (np.asarray(pool) != np.asarray(start)).any(axis=(1, 2, 3))
    assert set(np.flatnonzero(changed) // PAGES) == {1}
    own = start[PAGES : 2 * PAGES]
    _, expected = decode(weights, CONFIG, states(2, 1), own, step)
    np.testing.assert_array_equal(pool[PAGES : 2 * PAGES], expected)


def compiled_stack(layers: int, num_pages: int) -> jax.stages.Compiled:
    """One decode step of the dense stack, the flat pool donated, layers in a scan."""
    hf = HF | {"num_hidden_layers": layers}
    weights = dense_stack.load(dense_stack.random_tensors(hf), hf)
    arrays = place([70, 5], 1)

    def step(pool: jax.Array, tokens: jax.Array, *arrays: jax.Array) -> tuple:
        made = mla.decode_step(CONFIG, *arrays)
        return dense_stack.forward(mla.decode, weights, CONFIG, tokens, pool, made)

    pool = jax.ShapeDtypeStruct((layers * num_pages, 64, 1, 576), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    return jax.jit(step, donate_argnums=0).lower(pool, tokens, *arrays).compile()


def test_a_step_allocates_nothing_of_the_caches_size() -> None:
    """In float32: XLA's CPU backend scatters 16-bit floats by way of a float32 copy."""
    sizes = []
    for num_pages in (1024, 2048):
        memory = compiled_stack(3, num_pages).memory_analysis()
        pool = 3 * num_pages * 64 * 576 * 4
        assert memory.alias_size_in_bytes >= pool
        assert memory.output_size_in_bytes < pool + 2**20
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[0] == sizes[1] < pool / 16


def test_cuda_gets_kernels_and_nothing_else_touches_the_pool(weights: mla.MLAWeights) -> None:
    """One schedule; per layer an append, which alone has a pool as its result, and a decode."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)

    def step(x: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = mla.decode_step(CONFIG, *map(jnp.asarray, place([70, 5], 1)))
        for i in range(2):
            y, pool = mla.decode(half, CONFIG, x, pool, made.at_layer(i, PAGES))
            x += y
        return x, pool

    shapes = [((2, 1, HF["hidden_size"]), jnp.bfloat16), ((2 * PAGES, 64, 1, 576), jnp.bfloat16)]
    described = [jax.ShapeDtypeStruct(*x) for x in shapes]
    text = jax.jit(step).trace(*described).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"stablehlo.custom_call @(jax_flashmla_\w+)\(", text)
    assert calls == [
        "jax_flashmla_schedule",
        *["jax_flashmla_append_projected", "jax_flashmla_decode"] * 2,
    ]
    pool = f"tensor<{2 * PAGES}x64x1x576xbf16>"
    makers = [line for line in text.splitlines() if re.search(rf"(->|:) {pool}$", line)]
    makers = [line for line in makers if "return" not in line]
    assert len(makers) == 2
    assert all("@jax_flashmla_append_projected(" in line for line in makers)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, pool: (x[..., :8], pool), ValueError, r"x: got shape \[2, 1, 8\]"),
        (lambda x, pool: (x[:1], pool), ValueError, r"x: got shape \[1, 1, 256\], expected \[2, 1"),
        (lambda x, pool: (x, pool.astype(jnp.bfloat16)), TypeError, "pool: got bfloat16"),
        (
            lambda x, pool: (x.astype(jnp.bfloat16), pool.astype(jnp.bfloat16)),
            TypeError,
            "weights.down: got float32, expected bfloat16",
        ),
        (lambda x, pool: (x.astype(jnp.int32), pool), TypeError, "x: got int32"),
    ],
    ids=["width", "batch", "pool", "weights", "integers"],
)
def test_wrong_arrays_are_named(
    weights: mla.MLAWeights, change: Callable, error: type[Exception], match: str
) -> None:
    step = mla.decode_step(CONFIG, *place([70, 5], 1))
    x, pool = change(states(2, 1), cache.make_pool(1, PAGES, dtype=jnp.float32))
    with pytest.raises(error, match=match):
        mla.decode(weights, CONFIG, x, pool, step)


def test_weights_of_another_shape_are_named(weights: mla.MLAWeights) -> None:
    step = mla.decode_step(CONFIG, *place([70, 5], 1))
    pool = cache.make_pool(1, PAGES, dtype=jnp.float32)
    stacked = jax.tree.map(lambda x: x[None], weights)
    with pytest.raises(ValueError, match=r"weights.down: got shape \[1, 256, 672\]"):
        mla.decode(stacked, CONFIG, states(2, 1), pool, step)
    other = weights._replace(key_up=weights.key_up.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"weights.key_up: .* expected \[h_q, 32, 512\]"):
        mla.decode(other, CONFIG, states(2, 1), pool, step)


def test_a_prefill_step_is_no_decode_step(weights: mla.MLAWeights) -> None:
    table, lengths, slots = place([70, 5], 1)
    step = mla.prefill_step(CONFIG, table, lengths, np.ones(2, np.int32), slots)
    pool = cache.make_pool(1, PAGES, dtype=jnp.float32)
    with pytest.raises(ValueError, match="step: got one without a schedule"):
        mla.decode(weights, CONFIG, states(2, 1), pool, step)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"slots": np.zeros(2, np.int32)}, ValueError, r"slots: got shape \[2\]"),
        ({"slots": np.zeros((2, 1))}, TypeError, "slots: got float"),
        ({"block_table": np.zeros((3, 1), np.int32)}, ValueError, r"block_table: got shape \[3, 1"),
        ({"cache_seqlens": np.zeros(2, np.int16)}, TypeError, "cache_seqlens: got int16"),
        ({"query_lens": np.zeros(3, np.int32)}, ValueError, r"query_lens: got shape \[3\]"),
        ({"query_lens": None}, TypeError, "query_lens: got NoneType"),
    ],
)
def test_wrong_steps_are_named(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    names = ("block_table", "cache_seqlens", "slots")
    arrays = dict(zip(names, place([70, 5], 1), strict=True))
    given = arrays | {"query_lens": np.ones(2, np.int32)} | changes
    with pytest.raises(error, match=match):
        mla.prefill_step(CONFIG, **given)
    if "query_lens" not in changes:
        with pytest.raises(error, match=match):
            mla.decode_step(CONFIG, **{name: given[name] for name in names})


def test_a_batch_of_zero_runs(weights: mla.MLAWeights) -> None:
    step = mla.decode_step(CONFIG, *(x[:0] for x in place([70], 1)))
    pool = cache.make_pool(1, PAGES, dtype=jnp.float32)
    run = jax.jit(functools.partial(mla.decode, weights, CONFIG))
    y, _ = run(states(0, 1), pool, step)
    assert y.shape == (0, 1, HF["hidden_size"])
