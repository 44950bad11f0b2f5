"""Compiles a contender for many rows; times one chain alone."""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Chain, Contender
from workload import Row, make_inputs

from jax_flashmla._timing import Seconds, time_steps


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: The median is over these.
        seconds: Length of each repeat.
        matmul_side: Of the ceiling's square matmul.
    """

    repeats: int
    seconds: float
    matmul_side: int


FULL = Effort(repeats=7, seconds=0.04, matmul_side=8192)
QUICK = Effort(repeats=2, seconds=0.01, matmul_side=256)
COMPILE_THREADS = min(12, os.cpu_count() or 1)


def time_call(chain: Chain, effort: Effort) -> Seconds:
    """Time of one call of the chain."""
    # The queries go over the host: a copy on the device would be compiled for each shape.
    start = jnp.array(np.asarray(chain.inputs.q_latent))
    seconds, last = time_steps(chain, start, repeats=effort.repeats, seconds=effort.seconds)
    if not np.isfinite(np.asarray(last)).all():
        raise RuntimeError("the chain ended in inf or NaN")
    return seconds.per(chain.calls)


def build(
    contender: Contender,
    rows: Sequence[Row],
    kv_cache: jax.Array,
    *,
    say: Callable[[str], None],
    compile_seconds: float = 1e6,
) -> dict[Row, Chain]:
    """Compiles a contender's chains for many rows, on several threads.

    XLA's tuning runs on the device: build all before anything is timed.

    Args:
        contender: What to compile.
        rows: For which shapes.
        kv_cache: The pool all rows take from.
        say: Gets progress lines.
        compile_seconds: Rows not compiled by then are left out.
    """

    def compiled(row: Row) -> Chain:
        return contender.compile(row, make_inputs(row, kv_cache.shape[0]), kv_cache)

    start = time.perf_counter()
    built = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as threads:
        jobs = {row: threads.submit(compiled, row) for row in rows}
        for number, (row, job) in enumerate(jobs.items(), start=1):
            left = compile_seconds - (time.perf_counter() - start)
            try:
                built[row] = job.result(timeout=max(0.0, left))
            except TimeoutError:
                job.cancel()
                say(f"{contender.name} {row.name}: not compiled in time, left out")
            except jax.errors.JaxRuntimeError as error:
                say(f"{contender.name} {row.name}: left out, {str(error).splitlines()[0]}")
            if number % 10 == 0:
                say(f"[{number}/{len(rows)}] compiled {contender.name}")
    return built
