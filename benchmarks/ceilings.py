"""What this device reaches in this run: pure read, copy, matmul."""

import pathlib
import re
import subprocess
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from measure import Effort

from jax_flashmla._timing import time_steps

RUNNER = pathlib.Path(__file__).parents[1] / "build" / "runner" / "flashmla_runner"
BURST, IDLE_SECONDS = 10, 0.3


def measure(
    kv_cache: jax.Array, effort: Effort, runner: pathlib.Path | None = None
) -> dict[str, float]:
    """Measures the ceilings.

    Args:
        kv_cache: [num_pages, page_size, 1, head_dim_qk], read whole; half of it is copied.
        effort: How long, and how large a matmul.
        runner: The standalone runner, whose plain loads read faster than any XLA reduction; None
            or no such file: ``read_gbps`` is XLA's.

    Returns:
        ``read_gbps``; ``xla_read_gbps`` (maximum of every page); ``copy_gbps`` (negate; bytes read
        plus written); ``matmul_tflops`` (bfloat16, a burst of 10 on a card that was idle, as
        such ceilings are usually taken) and ``sustained_matmul_tflops`` (at the clock that the
        power limit leaves).
    """
    side = effort.matmul_side
    keys = jax.random.split(jax.random.key(3))
    # Scaled so that a chain of products keeps its magnitude.
    left = (jax.random.normal(keys[0], (side, side)) * side**-0.5).astype(kv_cache.dtype)
    right = jax.random.normal(keys[1], (side, side)).astype(kv_cache.dtype)
    half = jnp.array(kv_cache[: max(1, kv_cache.shape[0] // 2)])

    def seconds(step: Callable[[jax.Array], jax.Array], state: jax.Array) -> float:
        taken, _ = time_steps(step, state, repeats=effort.repeats, seconds=effort.seconds)
        return taken.median

    largest = jax.jit(lambda pool: pool.max(axis=(1, 2, 3)))
    negate = jax.jit(jnp.negative)
    multiply = jax.jit(lambda x: left @ x)
    flop = 2 * side**3
    read = kv_cache.nbytes / seconds(lambda _: largest(kv_cache), right) / 1e9
    return {
        "read_gbps": read_gbps(runner) or read,
        "xla_read_gbps": read,
        "copy_gbps": 2 * half.nbytes / seconds(lambda _: negate(half), right) / 1e9,
        "matmul_tflops": flop / _burst_seconds(multiply, right, effort.repeats) / 1e12,
        "sustained_matmul_tflops": flop / seconds(multiply, right) / 1e12,
    }


def read_gbps(runner: pathlib.Path | None) -> float | None:
    """Pure read bandwidth as the runner measures it, None where there is no runner or no GPU."""
    if jax.default_backend() != "gpu" or runner is None or not runner.exists():
        return None
    command = [str(runner), "ceiling=1"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return float(re.search(r"ceiling read: (\d+) GB/s", told)[1])


def _burst_seconds(step: Callable[[jax.Array], jax.Array], state: jax.Array, repeats: int) -> float:
    """Seconds of one step in the fastest short burst; the clock has no time to fall."""
    taken = []
    for _ in range(repeats):
        time.sleep(IDLE_SECONDS if jax.default_backend() == "gpu" else 0)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for _ in range(BURST):
            state = step(state)
        jax.block_until_ready(state)
        taken.append((time.perf_counter() - begin) / BURST)
    return min(taken)
