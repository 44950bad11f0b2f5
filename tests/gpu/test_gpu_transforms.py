"""The kernel under JAX's transformations, against its own plain call or the oracle."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_flashmla
from jax_flashmla.testing import checking, inputs
from jax_flashmla.testing.cases import Case, Shape

Arrays = tuple[jax.Array, ...]
Decode = Callable[..., checking.Decoded]
LAYERS = 3
TARGETS = ("jax_flashmla_decode", "jax_flashmla_schedule")


@pytest.fixture(scope="module")
def shape(rehearsal: bool) -> Shape:
    if rehearsal:
        return Shape(2, 2, 4, pages=4, pool_pages=16)
    return Shape(6, 2, 16, pages=32, pool_pages=512)


@pytest.fixture(scope="module")
def data(shape: Shape) -> inputs.Inputs:
    return inputs.make_inputs(Case(shape, "ragged", "sigma1", seed=11))


@pytest.fixture(scope="module")
def decode(shape: Shape, implementation: str) -> Decode:
    def call(*arrays: jax.Array) -> checking.Decoded:
        return jax_flashmla.mla_decode(
            *arrays, softmax_scale=shape.softmax_scale, implementation=implementation
        )

    return call


@pytest.fixture(scope="module")
def plain(decode: Decode, data: inputs.Inputs, shape: Shape) -> checking.Decoded:
    decoded = decode(*data.arrays())
    assert checking.judge(decoded, data, shape).faults == ()
    return decoded


def same_bits(a: Arrays, b: Arrays) -> bool:
    pairs = zip(a, b, strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize(
    "transform",
    [jax.jit, lambda f: jax.jit(jax.jit(f)), jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
    ids=["jit", "nested_jit", "checkpoint", "jit_checkpoint"],
)
def test_wrapping_keeps_the_bits(
    transform: Callable[[Decode], Decode],
    decode: Decode,
    data: inputs.Inputs,
    plain: checking.Decoded,
) -> None:
    assert same_bits(transform(decode)(*data.arrays()), plain)


def test_disable_jit_keeps_the_bits(
    decode: Decode, data: inputs.Inputs, plain: checking.Decoded
) -> None:
    with jax.disable_jit():
        assert same_bits(decode(*data.arrays()), plain)


def layered_pool(data: inputs.Inputs, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """A flat pool of several layers' pages, and each layer's block tables into it."""
    rolled = [jnp.roll(data.kv_cache, layer, axis=3) for layer in range(LAYERS)]
    offsets = jnp.arange(LAYERS, dtype=jnp.int32)[:, None, None] * shape.pool_pages
    return jnp.concatenate(rolled), data.block_table[None] + offsets


def layer_inputs(data: inputs.Inputs, layer: int) -> inputs.Inputs:
    return dataclasses.replace(data, kv_cache=jnp.roll(data.kv_cache, layer, axis=3))


def test_scan_over_layers_of_a_flat_pool(decode: Decode, data: inputs.Inputs, shape: Shape) -> None:
    pool, tables = layered_pool(data, shape)

    @jax.jit
    def run(pool: jax.Array, tables: jax.Array) -> Arrays:
        def layer(carry: None, table: jax.Array) -> tuple[None, checking.Decoded]:
            return carry, decode(data.q_latent, data.q_rope, pool, table, data.cache_seqlens)

        return jax.lax.scan(layer, None, tables)[1]

    out, lse = run(pool, tables)
    for layer in range(LAYERS):
        assert same_bits((out[layer], lse[layer]), decode(*layer_inputs(data, layer).arrays()))


def test_while_loop_with_lengths_that_grow(
    decode: Decode, data: inputs.Inputs, shape: Shape
) -> None:
    steps = 4
    start = jnp.maximum(data.cache_seqlens - steps, 0)

    @jax.jit
    def run(lengths: jax.Array) -> Arrays:
        def more(state: Arrays) -> jax.Array:
            return state[0] < steps

        def step(state: Arrays) -> Arrays:
            i, lengths, *_ = state
            lengths = jnp.minimum(lengths + 1, data.cache_seqlens)
            return i + 1, lengths, *decode(*data.arrays()[:-1], lengths)

        rows = (shape.batch, shape.s_q, shape.h_q)
        empty = jnp.zeros((*rows, 512), data.q_latent.dtype), jnp.zeros(rows)
        return jax.lax.while_loop(more, step, (jnp.int32(0), lengths, *empty))

    _, lengths, *decoded = run(start)
    np.testing.assert_array_equal(lengths, jnp.minimum(start + steps, data.cache_seqlens))
    assert same_bits(tuple(decoded), decode(*data.arrays()[:-1], lengths))


def test_fori_loop_with_the_donated_pool_in_its_carry(
    decode: Decode, data: inputs.Inputs, plain: checking.Decoded
) -> None:
    def run(pool: jax.Array) -> Arrays:
        def step(i: jax.Array, state: Arrays) -> Arrays:
            pool, total = state
            # A write to the pool between calls: a slot that nobody reads, NaN as before.
            pool = jnp.where(i < 0, jnp.zeros_like(pool), pool)
            out, _ = decode(data.q_latent, data.q_rope, pool, data.block_table, data.cache_seqlens)
            return pool, total + out.astype(jnp.float32)

        return jax.lax.fori_loop(0, 4, step, (pool, jnp.zeros(plain[0].shape, jnp.float32)))

    pool = jnp.copy(data.kv_cache)
    pool, total = jax.jit(run, donate_argnums=0)(pool)
    np.testing.assert_array_equal(total, 4 * np.asarray(plain[0], np.float32))
    assert same_bits((pool,), (data.kv_cache,))


def test_vmap_over_requests(decode: Decode, data: inputs.Inputs, shape: Shape) -> None:
    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(2, shape.batch // 2, *x.shape[1:])

    q_latent, q_rope, pool, *rest = data.arrays()
    mapped = jax.jit(jax.vmap(decode, in_axes=(0, 0, None, 0, 0)))
    out, lse = mapped(fold(q_latent), fold(q_rope), pool, *map(fold, rest))
    decoded = out.reshape(shape.batch, *out.shape[2:]), lse.reshape(shape.batch, *lse.shape[2:])
    assert checking.judge(decoded, data, shape).faults == ()


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(
    check_vma: bool, decode: Decode, data: inputs.Inputs, plain: checking.Decoded
) -> None:
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("requests",), auto, devices=jax.local_devices()[:1])
    batch, whole = PartitionSpec("requests"), PartitionSpec()
    sharded = jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=(batch, batch, whole, batch, batch),
        out_specs=(batch, batch),
        check_vma=check_vma,
    )
    assert same_bits(jax.jit(sharded)(*data.arrays()), plain)


def test_export_round_trip(decode: Decode, data: inputs.Inputs, plain: checking.Decoded) -> None:
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    exported = jax.export.export(jax.jit(decode), disabled_checks=allowed)(*data.arrays())
    again = jax.export.deserialize(exported.serialize())
    assert same_bits(again.call(*data.arrays()), plain)


def test_eval_shape_matches(decode: Decode, data: inputs.Inputs, plain: checking.Decoded) -> None:
    shapes = jax.eval_shape(decode, *data.arrays())
    assert [(s.shape, s.dtype) for s in shapes] == [(x.shape, x.dtype) for x in plain]
