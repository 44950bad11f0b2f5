"""Compiles a contender for many rows, then times it row by row."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

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
COMPILE_THREADS = 6


def measure(
    contender: Contender,
    rows: Sequence[Row],
    kv_cache: jax.Array,
    effort: Effort,
    *,
    say: Callable[[str], None],
    compile_seconds: float = 1e6,
) -> Iterator[tuple[Row, Seconds]]:
    """Yields the time of one call for each row.

    Everything is compiled first, on several threads: XLA's tuning runs on the device and must not
    overlap with a timed row.

    Args:
        contender: What to time.
        rows: On which shapes.
        kv_cache: The pool all rows take from.
        effort: How long.
        say: Gets progress lines.
        compile_seconds: Rows not compiled by then are left out.
    """
    built = _build(contender, rows, kv_cache, say, compile_seconds)
    for number, (row, chain) in enumerate(built.items(), start=1):
        seconds = time_call(chain, effort)
        say(f"[{number}/{len(built)}] {contender.name} {row.name}: {seconds.median * 1e6:.1f} us")
        yield row, seconds


def time_call(chain: Chain, effort: Effort) -> Seconds:
    """Time of one call of the chain."""
    # The queries go over the host: a copy on the device would be compiled for each shape.
    start = jnp.array(np.asarray(chain.inputs.q_latent))
    seconds, last = time_steps(chain, start, repeats=effort.repeats, seconds=effort.seconds)
    if not np.isfinite(np.asarray(last)).all():
        raise RuntimeError("the chain ended in inf or NaN")
    return seconds.per(chain.calls)


def _build(
    contender: Contender,
    rows: Sequence[Row],
    kv_cache: jax.Array,
    say: Callable[[str], None],
    compile_seconds: float,
) -> dict[Row, Chain]:
    def build(row: Row) -> Chain:
        return contender.compile(row, make_inputs(row, kv_cache.shape[0]), kv_cache)

    start = time.perf_counter()
    built = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS) as threads:
        jobs = {row: threads.submit(build, row) for row in rows}
        for number, (row, job) in enumerate(jobs.items(), start=1):
            left = compile_seconds - (time.perf_counter() - start)
            try:
                built[row] = job.result(timeout=max(0.0, left))
            except TimeoutError:
                job.cancel()
                say(f"{contender.name} {row.name}: not compiled in time, left out")
            except jax.errors.JaxRuntimeError as error:
                say(f"{contender.name} {row.name}: left out, {str(error).splitlines()[0]}")
            else:
                say(f"[{number}/{len(rows)}] compiled {contender.name} {row.name}")
    return built
