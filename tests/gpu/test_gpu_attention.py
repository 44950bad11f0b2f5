"""The attention in one call on the GPU: the bits of its steps, at every run, whatever ran before.

Its kernels begin while the one ahead ends: what one of them read too early would show here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import DIMS, SMALL, Problem, problem, ragged, random_weights

from jax_flashmla import _ffi, mla
from jax_flashmla.mla import layer
from jax_flashmla.testing.cache_oracle import bits

MODELS = {
    "low rank": mla.MLAConfig(7168, num_attention_heads=128, q_lora_rank=1536, **DIMS),
    "no low rank": mla.MLAConfig(2048, num_attention_heads=16, **DIMS),
}
SIZES = [(1, 1), (2, 1), (33, 1), (128, 1), (1, 2), (2, 2), (33, 2), (64, 2), (128, 2)]
IN_A_PROGRAM = [("low rank", 1), ("low rank", 33), ("no low rank", 1), ("no low rank", 33)]
REPETITIONS = 20
NORM_TOLERANCE = 0.1  # of the root mean square: XLA norms low-rank queries in the steps

Results = tuple[jax.Array, jax.Array]

attend = jax.jit(layer._attend, static_argnums=(1, 5))
attend_in_steps = jax.jit(layer._attend_in_steps, static_argnums=(1, 5))


@functools.cache
def weights_of(config: mla.MLAConfig, seed: int) -> mla.MLAWeights:
    return random_weights(config, "bfloat16", seed=seed)


def model(name: str, rehearsal: bool) -> mla.MLAConfig:
    return (SMALL if rehearsal else MODELS)[name]


def given_of(config: mla.MLAConfig, batch: int, s_q: int = 1, seed: int = 0) -> Problem:
    weights = weights_of(config, seed)
    options = {"dtype": "bfloat16", "seed": seed, "weights": weights}
    return problem(config, ragged(batch), s_q=s_q, **options)


def one_call(config: mla.MLAConfig, given: Problem) -> Results:
    return attend(given.weights, config, *given[1:], None)


def same(got: Results, expected: Results) -> jax.Array:
    """Whether all bits are, found out on the device."""
    pairs = zip(got, expected, strict=True)
    integers = [[jax.lax.bitcast_convert_type(x, jnp.uint16) for x in pair] for pair in pairs]
    return jnp.stack([jnp.array_equal(*pair) for pair in integers]).all()


# Values.


@pytest.mark.parametrize(("batch", "s_q"), SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_bits_of_the_steps(name: str, batch: int, s_q: int, rehearsal: bool) -> None:
    config = model(name, rehearsal)
    given = given_of(config, batch, s_q)
    out, pool = one_call(config, given)
    expected, expected_pool = attend_in_steps(given.weights, config, *given[1:], None)
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(bits(pool), bits(expected_pool))
    if config.q_lora_rank is None and not rehearsal:
        np.testing.assert_array_equal(bits(out), bits(expected))
    out, expected = np.float32(out), np.float32(expected)
    most = NORM_TOLERANCE * np.sqrt(np.square(expected).mean())
    assert np.abs(out - expected).max() <= most


@pytest.mark.parametrize("name", MODELS)
def test_empty_requests_give_zeros_and_slots_outside_leave_the_pool(
    name: str, rehearsal: bool
) -> None:
    config = model(name, rehearsal)
    given = given_of(config, 33)
    out, pool = one_call(config, given)
    empty = np.asarray(given.step.cache_seqlens) == 0
    assert empty.any()
    assert not np.float32(out)[empty].any()
    slots = np.asarray(given.step.slots)
    written = (bits(pool) != bits(given.pool)).any(axis=(2, 3))
    assert set(np.flatnonzero(written)) == set(slots[slots >= 0])


@pytest.mark.parametrize(("batch", "s_q"), SIZES[:-1])
@pytest.mark.parametrize("name", MODELS)
def test_up_to_128_tokens_it_is_one_call(name: str, batch: int, s_q: int, rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the kernels are the GPU's")
    config = MODELS[name]
    given = given_of(config, batch, s_q)
    text = attend.lower(given.weights, config, *given[1:], None).as_text()
    assert text.count(f"custom_call @{_ffi.ABSORBED_ATTENTION_TARGET}(") == 1


# Again and again, and in programs.


@pytest.mark.parametrize(("batch", "s_q"), SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_no_bits_change_in_many_calls(name: str, batch: int, s_q: int, rehearsal: bool) -> None:
    config = model(name, rehearsal)
    given = given_of(config, batch, s_q)
    first = one_call(config, given)
    count = 2 if rehearsal else REPETITIONS
    assert jnp.stack([same(one_call(config, given), first) for _ in range(count)]).all()


@jax.jit
def busy(x: jax.Array) -> jax.Array:
    """Keeps the GPU busy for a while; the values stay as they are but for rounding."""
    return jax.lax.fori_loop(0, 20, lambda _, y: y @ x, x)


def load(rehearsal: bool) -> jax.Array:
    return jnp.eye(64 if rehearsal else 4096)


@pytest.mark.parametrize(("name", "batch"), IN_A_PROGRAM)
def test_what_the_gpu_did_before_does_not_matter(name: str, batch: int, rehearsal: bool) -> None:
    config = model(name, rehearsal)
    given = given_of(config, batch)
    first = jax.block_until_ready(one_call(config, given))
    work, found = load(rehearsal), []
    for _ in range(2 if rehearsal else REPETITIONS):
        work = busy(work)
        found.append(same(one_call(config, given), first))
    assert jnp.stack(found).all()


@pytest.mark.parametrize(("name", "batch"), IN_A_PROGRAM)
def test_hidden_states_that_a_long_computation_ends_with(
    name: str, batch: int, rehearsal: bool
) -> None:
    """The first kernel is not to begin before what it reads is there."""
    config = model(name, rehearsal)
    given = given_of(config, batch)

    @jax.jit
    def run(given: Problem, work: jax.Array) -> tuple[Results, jax.Array]:
        work = busy(work)
        late = given.x + work[0, 1].astype(given.x.dtype)  # which is 0
        late, pool = jax.lax.optimization_barrier((late, given.pool))
        given = given._replace(x=late, pool=pool)
        return layer._attend(given.weights, config, *given[1:], None), work

    first = one_call(config, given)
    count = 2 if rehearsal else REPETITIONS
    assert jnp.stack([same(run(given, load(rehearsal))[0], first) for _ in range(count)]).all()


@pytest.mark.parametrize(("name", "batch"), IN_A_PROGRAM)
def test_layers_with_pools_of_their_own_in_one_program(
    name: str, batch: int, rehearsal: bool
) -> None:
    """A CUDA graph holds all their kernels; weights, hidden states and pools differ."""
    config = dataclasses.replace(model(name, rehearsal), num_attention_heads=16)
    layers = [given_of(config, batch, seed=seed) for seed in range(4)]

    @jax.jit
    def run(layers: list[Problem]) -> list[Results]:
        return [layer._attend(x.weights, config, *x[1:], None) for x in layers]

    expected = [one_call(config, given) for given in layers]
    for _ in range(2 if rehearsal else REPETITIONS):
        for got, alone in zip(run(layers), expected, strict=True):
            if rehearsal:
                np.testing.assert_allclose(np.float32(got[0]), np.float32(alone[0]), atol=2**-5)
            else:
                assert same(got, alone)


@pytest.mark.parametrize(("name", "batch"), IN_A_PROGRAM)
def test_layers_one_after_the_other_on_a_donated_pool(
    name: str, batch: int, rehearsal: bool
) -> None:
    """Each layer's hidden states come from the layer before, its pages are a share of one pool."""
    config = dataclasses.replace(model(name, rehearsal), num_attention_heads=8)
    given = problem(config, ragged(batch), dtype="bfloat16")
    pages = given.pool.shape[0]
    pools = jnp.concatenate([given.pool, -given.pool, given.pool])

    def run(pool: jax.Array, x: jax.Array, step: mla.Step) -> Results:
        for i in range(3):
            y, pool = mla.decode(given.weights, config, x, pool, step.at_layer(i, pages))
            x += y
        return x, pool

    stacked = jax.jit(run, donate_argnums=0)
    first = stacked(pools + 0, given.x, given.step)
    assert jnp.isfinite(first[0]).all()
    for _ in range(2 if rehearsal else REPETITIONS):
        donated = pools + 0
        place = donated.unsafe_buffer_pointer()
        got = stacked(donated, given.x, given.step)
        assert got[1].unsafe_buffer_pointer() == place
        assert same(got, first)
