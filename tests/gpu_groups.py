"""The groups of GPU checks: what runs, under which limit. `gpu_record.py` runs them all.

A group is either pytest files under tests/gpu (each test counts) or command lines (each counts as
one check, passed when it exits with 0). Every group, and every command line, is a process of its
own with a time limit: a hang costs that long and no more.
"""

import dataclasses
import itertools
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZER = ("compute-sanitizer", "--error-exitcode", "99", "--report-api-errors", "no")
SMALL_JAX = "tests/gpu/small_cases.py"
SMALL_CACHE = "tests/gpu/small_cache.py"
SMALL_QUERIES = "tests/gpu/small_queries.py"


@dataclasses.dataclass(frozen=True)
class Group:
    """One row of the record.

    Attributes:
        name: as in the record.
        seconds: limit of the whole pytest run, or of each command line.
        tests: pytest arguments relative to the repository.
        commands: command lines; {runner}, {checked_runner}, {probes} and {python} are filled in.
        environment: added to the environment.
    """

    name: str
    seconds: int
    tests: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _words(*lines: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split()) for line in lines)


def _grid(*tests: str) -> tuple[str, ...]:
    return tuple(f"tests/gpu/test_gpu_grid.py::test_{name}" for name in tests)


# Arguments of the standalone runner: every role of the kernels, in moments.
RUNNER = _words(
    "b=1 h_q=16 len=1",
    "b=4 h_q=128 s_q=2 len=1000,64,0,77",
    "b=4 h_q=128 s_q=2 len=1000,64,0,77 fp16=1",
    "b=6 h_q=63 s_q=3 len=2,129,128,127,65,4096 sigma=30",
    "b=3 h_q=24 h_kv=3 len=300,0,1025 causal=0",
    "b=2 h_q=128 len=8192 parts=1",
    "b=2 h_q=64 len=8192,100 parts=500",
    "b=2 h_q=64 len=700,65 parts=7",
    "b=2 h_q=16 len=700,65 parts=7",
    "b=2 h_q=16 len=4096,100 early=0",
    "b=133 h_q=20 len=200",
    "b=1 h_q=16 s_q=128 len=300",
    "b=32 h_q=128 len=2048 repeats=50",
)
STALE_RUNNER = _words(
    "b=4 h_q=128 len=1000,64,0,77 stale=1",
    "b=4 h_q=128 len=1000,64,0,77 stale=5000",
    "b=4 h_q=128 len=1000,640,100,77 stale=-640",
)
# Sanitizers slow a kernel down by two orders of magnitude: few pages, all roles.
SANITIZED = _words(
    "b=1 h_q=16 len=1 golden=0 repeats=2",
    "b=3 h_q=128 s_q=2 len=300,0,65 golden=0",
    "b=2 h_q=63 len=640,129 parts=6 golden=0",
    "b=2 h_q=6 h_kv=3 len=200,70 causal=0 fp16=1 golden=0 repeats=2",
    "b=2 h_q=16 len=300,129 stale=700",
)
DELAYS = tuple(
    (*words, "repeats=20", f"delay={seed}")
    for words, seed in itertools.product(
        (RUNNER[1], RUNNER[3], RUNNER[4], (*RUNNER[4], "early=0")), (1, 2)
    )
)


def _sanitized_runner(tool: str) -> Group:
    prefix = (*SANITIZER, "--tool", tool, "{runner}")
    return Group(f"runner-{tool}", 60, commands=tuple((*prefix, *words) for words in SANITIZED))


def _sanitized_jax(tool: str, name: str = "jax", script: str = SMALL_JAX) -> Group:
    """Only our kernels, each buffer an allocation of its own so that an overrun is seen."""
    ours = ("--kernel-name", "kernel_substring=flashmla")
    command = (*SANITIZER, *ours, "--tool", tool, "{python}", "-P", script)
    allocator = (("XLA_PYTHON_CLIENT_ALLOCATOR", "platform"),)
    return Group(f"{name}-{tool}", 240, commands=(command,), environment=allocator)


PROBES = (
    "boxes", "one_hot", "walk", "values", "weights", "ring", "named_barriers", "combine",
    "schedule", "exchange",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GROUPS = (
    Group("probes", 20, commands=tuple(("{probes}", name) for name in PROBES)),
    Group("runner", 30, commands=tuple(("{runner}", *w) for w in (*RUNNER, *STALE_RUNNER))),
    Group("grid-heads", 200, tests=_grid("heads")),
    Group("grid-queries", 200, tests=_grid("queries")),
    Group("grid-batches", 200, tests=_grid("batches")),
    Group("grid-lengths", 200, tests=_grid("kv_heads", "lengths", "parts", "models")),
    Group("data", 150, tests=("tests/gpu/test_gpu_data.py",)),
    Group("schedule", 150, tests=("tests/gpu/test_gpu_schedule.py",)),
    Group("repeat", 300, tests=("tests/gpu/test_gpu_repeat.py",)),
    Group("transforms", 120, tests=("tests/gpu/test_gpu_transforms.py",)),
    Group("api", 120, tests=("tests/gpu/test_gpu_api.py",)),
    Group("handler", 120, tests=("tests/gpu/test_gpu_handler.py",)),
    Group("cache", 120, tests=("tests/gpu/test_gpu_cache.py",)),
    Group("queries", 150, tests=("tests/gpu/test_gpu_queries.py",)),
    Group(
        "attention",
        200,
        tests=("tests/gpu/test_gpu_attention.py", "tests/gpu/test_gpu_attention_handler.py"),
    ),
    Group("merge", 120, tests=("tests/gpu/test_gpu_merge.py",)),
    Group("exchange", 120, tests=("tests/gpu/test_gpu_exchange.py",)),
    Group("layer", 150, tests=("tests/gpu/test_gpu_layer.py",)),
    Group("runner-delays", 60, commands=tuple(("{checked_runner}", *words) for words in DELAYS)),
    *(_sanitized_runner(tool) for tool in TOOLS),
    *(_sanitized_jax(tool) for tool in TOOLS),
    *(
        _sanitized_jax(tool, "cache", SMALL_CACHE)
        for tool in ("memcheck", "racecheck", "initcheck")
    ),
    *(_sanitized_jax(tool, "queries", SMALL_QUERIES) for tool in TOOLS),
)
