"""The Flax NNX modules: same numbers as the functions, and only the cache is donated."""

import functools

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_flashmla import cache, mla
from jax_flashmla.mla.nnx import MLAAttention, PagedLatentCache, make_cache

CONFIG = dense_stack.hf_config("deepseek_v3", num_hidden_layers=2)
LAYERS, PAGES = 2, 4


class Stack(nnx.Module):
    """Two layers with residuals around them, and the cache of both."""

    def __init__(self, layers: list[mla.MLAWeights]) -> None:
        config = mla.MLAConfig.from_hf(CONFIG)
        self.layers = nnx.List([MLAAttention(config, weights) for weights in layers])
        self.cache = make_cache(LAYERS, PAGES, dtype=jnp.float32)

    def __call__(self, x: jax.Array, step: mla.Step, *, prefill: bool = False) -> jax.Array:
        for i, layer in enumerate(self.layers):
            run = layer.prefill if prefill else layer.decode
            x += run(x, self.cache, step.at_layer(i, PAGES))
        return x


@pytest.fixture(scope="module")
def weights() -> list[mla.MLAWeights]:
    tensors = dense_stack.random_tensors(CONFIG)
    config = mla.MLAConfig.from_hf(CONFIG)
    prefixes = [f"model.layers.{i}.self_attn." for i in range(LAYERS)]
    return [mla.load_weights(tensors, config, prefix=prefix) for prefix in prefixes]


def inputs(s_q: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Two requests with s_q tokens after 60: hidden states, and table, lengths and slots."""
    x = jax.random.normal(jax.random.key(s_q), (2, s_q, CONFIG["hidden_size"]))
    table = np.array([[1, 3], [2, 0]], np.int32)
    positions = 60 + np.arange(s_q)
    slots = table[:, positions // 64] * 64 + positions % 64
    lengths = np.full(2, 60 + s_q, np.int32)
    return x, tuple(map(jnp.asarray, (table, lengths, slots.astype(np.int32))))


def test_module_computes_what_the_functions_do(weights: list[mla.MLAWeights]) -> None:
    config = mla.MLAConfig.from_hf(CONFIG)
    model = Stack(weights)
    pool = cache.make_pool(LAYERS, PAGES, dtype=jnp.float32)
    for s_q, prefill in ((8, True), (2, False)):
        x, (table, lengths, slots) = inputs(s_q)
        if prefill:
            step = mla.prefill_step(config, table, lengths, jnp.full(2, s_q, jnp.int32), slots)
        else:
            step = mla.decode_step(config, table, lengths, slots)
        expected = x
        for i, layer in enumerate(weights):
            run = jax.jit(mla.prefill if prefill else mla.decode, static_argnums=1)
            y, pool = run(layer, config, expected, pool, step.at_layer(i, PAGES))
            expected += y
        got = model(x, step, prefill=prefill)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.cache[...], pool, rtol=1e-4, atol=1e-5)


def test_serving_donates_the_cache_and_nothing_else(weights: list[mla.MLAWeights]) -> None:
    config = mla.MLAConfig.from_hf(CONFIG)
    graphdef, pool, rest = nnx.split(Stack(weights), PagedLatentCache, ...)
    assert len(jax.tree.leaves(pool)) == 1

    @functools.partial(jax.jit, donate_argnames="pool")
    def serve(pool: nnx.State, rest: nnx.State, x: jax.Array, arrays: tuple) -> tuple:
        model = nnx.merge(graphdef, pool, rest)
        y = model(x, mla.decode_step(config, *arrays))
        return y, nnx.state(model, PagedLatentCache)

    before = jax.tree.leaves(pool)[0].unsafe_buffer_pointer()
    y, after = serve(pool, rest, *inputs(1))
    (array,) = jax.tree.leaves(after)
    assert np.isfinite(np.asarray(y)).all()
    assert array.unsafe_buffer_pointer() == before
    assert jax.tree.leaves(pool)[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(rest))
    written = np.asarray(array)[:, 60].any(axis=(1, 2))
    assert written.tolist() == [False, True, True, False] * LAYERS
