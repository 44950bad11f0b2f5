"""Same inputs, same schedule, same bits: repeated, replayed from a graph, on two streams."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay

import jax_flashmla
from jax_flashmla.testing import checking, inputs
from jax_flashmla.testing.cases import Case, Shape

Fit = Callable[[Shape], Shape]
SECONDS = 150
REPEATED = (
    Shape(6, 1, 16, pages=64),
    Shape(2, 2, 128, pages=64, dtype="float16"),
    Shape(133, 1, 64, pages=16),
)


def differing(shape: Shape, repeats: int, implementation: str) -> Callable[..., jax.Array]:
    """How many of `repeats` runs inside one loop differ in any bit from a first one."""

    def decode(*arrays: jax.Array) -> checking.Decoded:
        return jax_flashmla.mla_decode(
            *arrays, softmax_scale=shape.softmax_scale, implementation=implementation
        )

    def bits(decoded: checking.Decoded) -> tuple[jax.Array, jax.Array]:
        out, lse = decoded
        as_ints = jax.lax.bitcast_convert_type
        return as_ints(out, jnp.uint16), as_ints(lse, jnp.uint32)

    @jax.jit
    def run(*arrays: jax.Array) -> jax.Array:
        out, lse = bits(decode(*arrays))

        def again(i: jax.Array, count: jax.Array) -> jax.Array:
            # Tied to the counter, so that the loop really calls it each time.
            tied, _ = jax.lax.optimization_barrier((arrays, i))
            out_again, lse_again = bits(decode(*tied))
            same = (out == out_again).all() & (lse == lse_again).all()
            return count + (~same).astype(jnp.int32)

        return jax.lax.fori_loop(0, repeats, again, jnp.int32(0))

    return run


@pytest.mark.parametrize("shape", REPEATED, ids=lambda shape: shape.name)
def test_a_thousand_repeats_give_the_same_bits(
    shape: Shape, fit: Fit, implementation: str, rehearsal: bool
) -> None:
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, "ragged", "sigma5", seed=1))
    run = differing(shape, 5 if rehearsal else 1000, implementation)
    assert int(run(*data.arrays())) == 0


def test_repeats_between_other_work_give_the_same_bits(
    fit: Fit, implementation: str, rehearsal: bool
) -> None:
    """Dispatched one by one, each into fresh memory full of NaN, between matrix products."""
    shape = fit(Shape(6, 1, 128, pages=32))
    data = inputs.make_inputs(Case(shape, "ragged", "rising", seed=4))
    first = [np.asarray(array).tobytes() for array in checking.decode(shape, data, implementation)]
    work = jax.jit(lambda x: x @ x)
    square = jnp.ones((64, 64) if rehearsal else (2048, 2048))
    for _ in range(3 if rehearsal else 100):
        square = work(square) * 1e-4
        decoded = checking.decode(shape, data, implementation)
        assert [np.asarray(array).tobytes() for array in decoded] == first


def test_replayed_program_is_right_at_every_step(rehearsal: bool, implementation: str) -> None:
    shape = replay.shape(small=rehearsal)
    step = replay.layered(shape, implementation)
    kept = []
    for lengths, seed in replay.STEPS:
        data = inputs.make_inputs(Case(shape, lengths, "sigma1", seed=seed))
        kept.append(data)
        results = step(data)
        for layer in range(0, replay.LAYERS, 3):
            turned = dataclasses.replace(data, q_latent=jnp.roll(data.q_latent, layer, axis=2))
            decoded = results[2 * layer], results[2 * layer + 1]
            assert checking.judge(decoded, turned, shape).faults == ()


def replayed(flags: str, implementation: str, rehearsal: bool, *options: str) -> list[str]:
    """Digests of a replay in a process with its own XLA flags."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1]),
    }
    script = str(Path(replay.__file__))
    words = [sys.executable, "-P", script, "--implementation", implementation, *options]
    words += ["--small"] if rehearsal else []
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize(
    "flags",
    [
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_graph_min_graph_size=1",
        "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT --xla_gpu_graph_min_graph_size=1",
    ],
    ids=["no_graphs", "graphs", "concurrent_graphs"],
)
def test_graphs_do_not_change_bits(flags: str, implementation: str, rehearsal: bool) -> None:
    shape = replay.shape(small=rehearsal)
    here = replay.digests(shape, replay.layered(shape, implementation))
    assert here == replayed(flags, implementation, rehearsal)


@pytest.mark.parametrize("graphs", [True, False])
def test_two_streams_at_once_do_not_change_bits(
    graphs: bool, implementation: str, rehearsal: bool
) -> None:
    if rehearsal:
        pytest.skip("streams are a GPU's")
    shape = replay.shape(small=rehearsal)
    here = replay.digests(shape, replay.layered(shape, implementation))
    flags = "" if graphs else "--xla_gpu_enable_command_buffer="
    assert here == replayed(flags, implementation, rehearsal, "--streams")
