"""Device time of append, gather and merge_partials, and their share of copy bandwidth.

    python benchmarks/cache_ops.py             # results/h200-cache-ops.json
    python benchmarks/cache_ops.py --quick     # tiny sizes: checks the script only

The time is the kernel's own, as CUPTI reports it through the profiler that JAX ships: the median of
20 launches of the same call. Large rows move several times what L2 holds; small rows find their
inputs in L2, as in a decode step, where the kernel before has just written them. Bytes are what has
to be read and written once. Copy bandwidth, read plus written, is 4240 GB/s on an H200, which
device-to-device copies reach there; XLA's negation of 2 GB, timed in the same run, reaches less.
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable

import environment
import jax
import jax.numpy as jnp
import numpy as np
import script
import workload
from measure import QUICK

from jax_flashmla import cache, merge_partials
from jax_flashmla._timing import time_steps

RUNS = 20
WARM_RUNS = 3  # of the profiled ones, left out
COPY_BYTES = 2 * 10**9
COPY_GBPS = {"NVIDIA H200": 4240.0}  # measured; on other devices XLA's negation stands for it
SMALL_US, LARGE_SHARE = 4.0, 0.8  # the goals
RESULTS = pathlib.Path(__file__).parent / "results" / "h200-cache-ops.json"
TOKEN_BYTES = 576 * 2
Call = tuple[Callable[..., object], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured call.

    Attributes:
        kind: "append", "rotated" (append with cos and sin), "projected" (append_projected behind a
            query of 1536), "gather" or "merge".
        sizes: n rows; requests and tokens of each; n partials, rows and 512 columns of float32.
        large: whether it is held against copy bandwidth, else against a time.
    """

    kind: str
    sizes: tuple[int, ...]
    large: bool

    @property
    def name(self) -> str:
        """Kind and sizes, as --rows takes them."""
        return f"{self.kind}/{'x'.join(map(str, self.sizes))}"

    @property
    def bytes(self) -> int:
        """Bytes read and written, each once."""
        if self.kind == "gather":
            return 2 * TOKEN_BYTES * math.prod(self.sizes)
        if self.kind == "merge":
            partials, rows = self.sizes
            return (partials + 1) * rows * (4 * 512 + 4)
        rotation = 2 * 32 * 4 if self.kind != "append" else 0
        return self.sizes[0] * (2 * TOKEN_BYTES + 4 + rotation)

    def shrunk(self) -> "Row":
        """The same call, tiny."""
        return dataclasses.replace(self, sizes=tuple(min(size, 70) for size in self.sizes))


APPENDS = "append", "rotated", "projected"
ROWS = (
    *(Row(kind, (n,), n > 1000) for kind in APPENDS for n in (1, 128, 131072)),
    *(Row("gather", (b, length), b > 1) for b, length in ((1, 1024), (32, 4096), (128, 4096))),
    *(Row("merge", (n, rows), False) for n, rows in ((2, 16), (8, 128), (64, 16))),
    *(Row("merge", (n, rows), True) for n, rows in ((2, 65536), (8, 32768), (64, 4096))),
)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = _options()
    rows = script.choose_rows(options, _matching)
    seconds = _wall_seconds if options.quick else _kernel_seconds
    side = 2**10 if options.quick else COPY_BYTES // 2
    copied = jnp.ones(side, jnp.bfloat16)
    negate = 2 * copied.nbytes / seconds((jax.jit(jnp.negative), (copied,)), "") / 1e9
    del copied
    copy = max(negate, COPY_GBPS.get(jax.devices()[0].device_kind, 0.0))

    entries = []
    for row in rows:
        taken = seconds(make_call(row), "flashmla")
        gbps = row.bytes / taken / 1e9
        entry = {"row": row.name, "us": taken * 1e6, "gbps": gbps, "share_of_copy": gbps / copy}
        within = gbps >= LARGE_SHARE * copy if row.large else taken * 1e6 <= SMALL_US
        goal = f">= {LARGE_SHARE:.0%} of copy" if row.large else f"<= {SMALL_US} us"
        entries.append(entry | {"goal": goal, "within_goal": bool(within)})
        print(_line(entries[-1]), flush=True)
    result = {
        "env": environment.describe(options.commit),
        "ceilings": {"copy_gbps": copy, "xla_negate_gbps": negate},
        "rows": entries,
    }
    script.write(result, options, RESULTS)


def make_call(row: Row) -> Call:
    """The compiled function and its arguments, random and full of valid slots and pages."""
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 2)
    if row.kind == "merge":
        partials, rows = row.sizes
        outs = jax.random.normal(keys[0], (partials, rows, 512))
        return jax.jit(merge_partials), (outs, jax.random.normal(keys[1], (partials, rows)))
    if row.kind == "gather":
        requests, length = row.sizes
        width = -(-length // 64)
        table = jnp.asarray(rng.permutation(requests * width).reshape(requests, width), jnp.int32)
        pool = jax.random.normal(keys[0], (requests * width, 64, 1, 576), jnp.bfloat16)
        return jax.jit(cache.gather), (pool, table, jnp.full(requests, length, jnp.int32))
    (n,) = row.sizes
    pages = max(256, -(-n // 64))
    angles = jnp.asarray(rng.uniform(-9, 9, (n, 32)), jnp.float32)
    rotation = jnp.cos(angles), jnp.sin(angles)
    slots = jnp.asarray(rng.permutation(pages * 64)[:n], jnp.int32)
    if row.kind == "projected":
        projected = jax.random.normal(keys[0], (n, 1536 + 576), jnp.bfloat16)
        return jax.jit(_append_projected), (cache.make_pool(1, pages), projected, slots, *rotation)
    latent = jax.random.normal(keys[0], (n, 512), jnp.bfloat16)
    rope = jax.random.normal(keys[1], (n, 64), jnp.bfloat16)
    arrays = cache.make_pool(1, pages), latent, rope, slots
    if row.kind == "append":
        return jax.jit(cache.append), arrays
    append = jax.jit(lambda *x: cache.append(*x[:4], cos=x[4], sin=x[5], rope_interleave=True))
    return append, (*arrays, *rotation)


def _append_projected(
    pool: jax.Array, projected: jax.Array, slots: jax.Array, cos: jax.Array, sin: jax.Array
) -> jax.Array:
    norm = {"latent_norm": jnp.ones(512, jnp.bfloat16), "norm_eps": 1e-6}
    rotation = {"cos": cos, "sin": sin, "rope_interleave": True}
    return cache.append_projected(pool, projected, slots, **norm, **rotation)


def _kernel_seconds(call: Call, named: str) -> float:
    """Median device time of the kernel whose name holds `named`; copies around it do not count."""
    from jax.experimental.mosaic.gpu import profiler

    function, arguments = call
    measure = profiler.measure(function, aggregate=False, iterations=RUNS + WARM_RUNS)
    _, runs = measure(*arguments)
    taken = [[ms for name, ms in kernels if named in name] for kernels in runs[WARM_RUNS:]]
    if any(len(times) != 1 for times in taken):
        names = sorted({name for kernels in runs for name, _ in kernels})
        raise RuntimeError(f"expected one kernel named {named!r} in each run, got {names}")
    return statistics.median(times[0] for times in taken) / 1e3


def _wall_seconds(call: Call, named: str) -> float:
    """What --quick prints in the place of a device time."""
    del named
    function, arguments = call
    taken, _ = time_steps(
        lambda _: function(*arguments), None, repeats=QUICK.repeats, seconds=QUICK.seconds
    )
    return taken.median


def _matching(patterns: str) -> list[Row]:
    return [row for row in ROWS if workload.matches(row.name, patterns)]


def _line(entry: dict[str, object]) -> str:
    verdict = "within" if entry["within_goal"] else "OUTSIDE"
    return (
        f"{entry['row']:18} {entry['us']:9.2f} us {entry['gbps']:7.0f} GB/s"
        f" {entry['share_of_copy']:5.0%} of copy ({verdict} {entry['goal']})"
    )


def _options() -> argparse.Namespace:
    return script.parser(__doc__.splitlines()[0], rows="*", results=RESULTS).parse_args()


if __name__ == "__main__":
    main()
