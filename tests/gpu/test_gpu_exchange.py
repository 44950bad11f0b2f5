"""The direct exchange over all GPUs of this host, be it one: float64, mailboxes, repeats.

`benchmarks/mesh.py` has more of it for several GPUs.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import exchange_partials
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from jax_flashmla import _direct_exchange
from jax_flashmla.testing.cache_oracle import bits

N = jax.local_device_count()
MESH = jax.make_mesh((N,), ("context",))
# k, rows: less than a warp's block, several rows to a warp, two rounds where there are GPUs for it.
SIZES = (1, 1), (1, 9), (3, 70), (5, 40), (2, 1100), (1, 3000)
Pair = tuple[jax.Array, jax.Array]


def exchange(
    implementation: str, change: Callable[[jax.Array], jax.Array] = lambda x: x
) -> Callable[..., Pair]:
    """The exchange of `[N, k, rows, 512]` and `[N, k, rows]`; `change` is made to the addresses."""

    def local(outs: jax.Array, lses: jax.Array) -> Pair:
        options = {"axis_name": "context", "implementation": implementation}
        boxes = _direct_exchange.get_mailboxes(lses.size, **options)
        boxes = dataclasses.replace(boxes, addresses=change(boxes.addresses))
        return _direct_exchange.merge_over(outs[0], lses[0], boxes, **options)

    specs = P("context"), P("context")
    mapped = jax.jit(jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P()))

    def call(*arrays: np.ndarray) -> Pair:
        return mapped(*(jax.device_put(x, NamedSharding(MESH, P("context"))) for x in arrays))

    return call


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exchange_is_the_merge_of_all_partials(
    size: tuple[int, int], dtype: str, implementation: str
) -> None:
    outs, lses = exchange_partials.draw(N, *size, dtype)
    call = exchange(implementation)
    first = call(outs, lses)
    assert exchange_partials.wrong(outs, lses, first) == 0
    for _ in range(5):
        for got, expected in zip(call(outs, lses), first, strict=True):
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(bits(shard.data), bits(expected))


def test_exchanges_of_one_program_do_not_mix(implementation: str) -> None:
    outs, lses = exchange_partials.draw(N, 2, 50, "bfloat16")
    call = functools.partial(exchange(implementation), outs)

    @jax.jit
    def chain(lses: jax.Array) -> list[Pair]:
        return [call(lses + i) for i in range(8)]

    for i, (out, lse) in enumerate(chain(lses)):
        for got, expected in zip((out, lse), call(lses + np.float32(i)), strict=True):
            np.testing.assert_array_equal(bits(got), bits(expected))


WRONG = {"another process": (0, 12345), "too few rows": (6, 8), "not linked": (7, 1 << 14)}


@pytest.mark.parametrize("why", WRONG)
def test_an_impossible_exchange_is_nan_and_the_next_one_right(
    why: str, implementation: str, rehearsal: bool
) -> None:
    if rehearsal:
        pytest.skip("the portable lowering has no mailboxes")
    if why == "another process" and N == 1:
        pytest.skip("no other GPU whose process could be another")
    word, value = WRONG[why]
    outs, lses = np.ones((N, 1, 40, 512), jnp.bfloat16), np.zeros((N, 1, 40), np.float32)
    right = exchange(implementation)
    before = right(outs, lses)
    wrong = exchange(implementation, lambda x: x.at[-1, word].set(np.uint32(value)))
    for result in wrong(outs, lses):
        assert np.isnan(np.asarray(result, np.float32)).all()
    for got, expected in zip(right(outs, lses), before, strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))
        assert np.isfinite(np.asarray(got, np.float32)).all()


@pytest.mark.skipif(N < 2, reason="needs two GPUs")
def test_a_gpu_that_does_not_come_is_awaited_once(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the portable lowering has no mailboxes")
    script = Path(__file__).parent / "late_exchange.py"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-P", script],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    waited = float(done.stdout.split()[1])
    assert 1 <= waited < 2
