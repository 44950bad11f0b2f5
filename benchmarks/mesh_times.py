"""Times the programs of a row in turns, and counts what XLA made of them."""

import concurrent.futures
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import lanes
import measure
import mesh_workload
import script
import workload
from mesh_workload import Pools, Program, Spread

COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
SCHEDULE = "jax_flashmla_schedule"
TARGET = re.compile(r'custom_call_target="(jax_flashmla_\w+)"')
# XLA's default and COLLECTIVES.
CAPTURED = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that is ready to run."""

    program: Program
    run: jax.stages.Compiled
    counts: dict[str, int]


def measure_rows(
    spreads: Sequence[Spread], counts: Sequence[int], *, quick: bool, done: Callable[[dict], None]
) -> None:
    """Times all rows; compiles everything before.

    Args:
        spreads: The rows.
        counts: Numbers of GPUs.
        quick: Short turns of short chains.
        done: Gets the entry of each row.
    """
    pools = Pools(
        jax.devices()[: max(counts)], workload.most_pages(spread.row for spread in spreads)
    )
    begin = time.perf_counter()
    rows = {spread: list(mesh_workload.programs(spread, pools, counts)) for spread in spreads}
    if quick:
        rows = {
            row: [dataclasses.replace(x, calls=3) for x in found] for row, found in rows.items()
        }
    with concurrent.futures.ThreadPoolExecutor(measure.COMPILE_THREADS) as threads:
        jobs = {row: [threads.submit(compiled, x) for x in found] for row, found in rows.items()}
        ready = {row: [job.result() for job in found] for row, found in jobs.items()}
    script.say(f"compiled {sum(map(len, ready.values()))} in {time.perf_counter() - begin:.0f} s")
    turns = lanes.QUICK if quick else lanes.BURSTS
    for spread in script.progress(ready, len(ready), "rows"):
        timings = lanes.interleave([lane(x) for x in ready[spread]], turns)
        done(entry(spread, ready[spread], timings))


def entry(spread: Spread, ready: Sequence[Compiled], timings: dict[str, lanes.Seconds]) -> dict:
    """A row of the results."""
    return {
        "row": spread.name,
        "way": spread.way,
        "h_q": spread.row.h_q,
        "batch": spread.row.batch,
        "seqlen": spread.row.seqlen,
        "programs": {
            x.program.name: {
                "us": timings[x.program.name].median * 1e6,
                "us_low": timings[x.program.name].low * 1e6,
                "us_high": timings[x.program.name].high * 1e6,
                "calls": x.program.calls,
                "compiled": x.counts,
            }
            for x in ready
        },
    }


def compiled(program: Program) -> Compiled:
    """Compiles the chain of a program."""
    chain = jax.jit((scanned if program.scan else chained)(program), donate_argnums=0)
    lowered = chain.lower(program.state, program.rest, program.tables)
    run = lowered.compile(compiler_options=CAPTURED if program.captured else None)
    return Compiled(program, run, count(run.as_text()))


def chained(program: Program) -> Callable[..., object]:
    """The function of a chain: each call gets the state that the one before gave."""
    attend = jax.jit(program.attend)  # traced and lowered once; XLA inlines it

    def run(state: object, rest: tuple, tables: tuple) -> object:
        shared = program.before(*rest, tables[0])
        for table in itertools.islice(itertools.cycle(tables), program.calls):
            state = attend(state, *rest, table, *shared)
        return state

    return run


def scanned(program: Program) -> Callable[..., object]:
    """The same as a loop of XLA's."""

    def run(state: object, rest: tuple, tables: tuple) -> object:
        stacked, shared = jnp.stack(tables), program.before(*rest, tables[0])

        def step(state: object, i: jax.Array) -> tuple[object, None]:
            table = jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)
            return program.attend(state, *rest, table, *shared), None

        places = jnp.arange(program.calls, dtype=jnp.int32) % len(tables)
        return jax.lax.scan(step, state, places)[0]

    return run


def count(text: str) -> dict[str, int]:
    """Collectives and calls of our kernels in a compiled chain, and schedules inside its loop."""
    found = COLLECTIVE.findall(text) + TARGET.findall(text)
    counts = {name: found.count(name) for name in sorted(set(found))}
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    parts = re.findall(r"^%?([\w.-]+) \((.*?)^}", text, re.MULTILINE | re.DOTALL)
    looped = (TARGET.findall(part) for name, part in parts if name in bodies)
    counts["schedules in a loop"] = sum(found.count(SCHEDULE) for found in looped)
    return {name: n for name, n in counts.items() if n}


def lane(ready: Compiled) -> lanes.Lane:
    """A lane of a compiled chain; each run starts from the last one's state."""
    program = ready.program

    def step(state: object) -> object:
        return ready.run(state, program.rest, program.tables)

    state = jax.tree.map(jnp.copy, program.state)  # it is donated
    return lanes.stepping_lane(program.name, program.calls, step, state)
