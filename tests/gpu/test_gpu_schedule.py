import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import schedule
from jax_flashmla.testing import checking, inputs
from jax_flashmla.testing.cases import Case, Shape

Fit = Callable[[Shape], Shape]
BATCH_AND_PARTS = (
    (1, 1), (1, 132), (2, 7), (31, 66), (32, 132), (128, 1), (128, 132), (133, 500), (1024, 132),
    (4096, 264),
)  # fmt: skip
SHAPES = (Shape(8, 1, 16, pages=64), Shape(8, 2, 128, pages=32), Shape(33, 1, 64, pages=32))
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


@pytest.mark.parametrize(("batch", "parts"), BATCH_AND_PARTS)
def test_device_schedule_equals_the_definition(batch: int, parts: int) -> None:
    on_device = jax.jit(lambda n: jax_flashmla.get_mla_metadata(n, 64, 1, num_sm_parts=parts))
    defined = jax.jit(lambda n: schedule.plan(n, parts))
    rng = np.random.default_rng([batch, parts])
    int32 = np.iinfo(np.int32)
    for longest in (0, 1, 64, 65, 1000, 8192, 131072, int32.max):
        for lengths in (
            rng.integers(0, longest, batch, endpoint=True),
            np.full(batch, longest),
            np.where(rng.random(batch) < 0.1, longest, 0),
            np.where(rng.random(batch) < 0.1, int32.min, longest // 2),
        ):
            lengths = jnp.asarray(lengths, jnp.int32)
            for got, expected in zip(on_device(lengths), defined(lengths), strict=True):
                np.testing.assert_array_equal(got, expected)


def decode_with(
    shape: Shape, planned: jax.Array, data: inputs.Inputs, implementation: str
) -> checking.Decoded:
    """Decodes with a schedule made for the lengths `planned`."""
    made = jax_flashmla.get_mla_metadata(planned, shape.rows, shape.h_kv)
    return jax_flashmla.mla_decode(
        *data.arrays(),
        softmax_scale=shape.softmax_scale,
        causal=shape.causal,
        schedule=made,
        implementation=implementation,
    )


@with_shape
@pytest.mark.parametrize("change", [-1, 1, 64, -640, 10**6, -(10**6)])
def test_stale_schedule_spares_the_requests_it_fits(
    shape: Shape, change: int, fit: Fit, implementation: str
) -> None:
    """Every third length was another one when the schedule was made; the others keep their bits."""
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, "ragged", "sigma1", "in_order", seed=2))
    changed = np.arange(shape.batch) % 3 == 1
    planned = np.asarray(data.cache_seqlens, np.int64) + change * changed
    planned = jnp.asarray(np.clip(planned, 0, 2**30), jnp.int32)
    legal = dataclasses.replace(
        data, cache_seqlens=jnp.minimum(planned, jnp.where(changed, 0, planned))
    )
    fresh = decode_with(shape, planned, legal, implementation)
    stale = decode_with(shape, planned, data, implementation)
    for a, b in zip(fresh, stale, strict=True):
        assert np.asarray(a)[~changed].tobytes() == np.asarray(b)[~changed].tobytes()
    whole = decode_with(shape, data.cache_seqlens, data, implementation)
    assert checking.judge(whole, data, shape).faults == ()
    for a, b in zip(whole, stale, strict=True):
        a, b = (np.asarray(x, np.float32)[~changed] for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-3)


@with_shape
def test_schedule_made_for_another_batch_harms_nobody_else(
    shape: Shape, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, "ragged", "sigma1", seed=3))
    foreign = jnp.full(5 * shape.batch, 10 * shape.capacity, jnp.int32)
    metadata, splits = jax_flashmla.get_mla_metadata(foreign, 64, 1, num_sm_parts=100)
    zeros = jnp.zeros_like(metadata), jnp.zeros(shape.batch + 1, jnp.int32)
    for made in (
        (metadata, splits[: shape.batch + 1]),
        (metadata, splits[-shape.batch - 1 :]),
        zeros,
    ):
        jax.block_until_ready(
            jax_flashmla.mla_decode(
                *data.arrays(), softmax_scale=0.1, schedule=made, implementation=implementation
            )
        )
    decoded = checking.decode(shape, data, implementation)
    assert checking.judge(decoded, data, shape).faults == ()


@with_shape
def test_one_schedule_serves_other_calls_with_these_lengths(
    shape: Shape, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    for seed in range(4):
        data = inputs.make_inputs(Case(shape, "edges", "sigma5", seed=7))
        data = dataclasses.replace(data, q_latent=jnp.roll(data.q_latent, seed, axis=2))
        decoded = decode_with(shape, data.cache_seqlens, data, implementation)
        assert checking.judge(decoded, data, shape).faults == ()
