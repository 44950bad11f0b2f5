"""Which kernels a layer of a step launches, and how long each one holds the step up.

Times are CUPTI's, through the profiler that JAX ships.
"""

import collections
import itertools
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax

State = TypeVar("State")
PROFILED_STEPS = 5


class Event(NamedTuple):
    """A kernel's run.

    Attributes:
        name: Of the kernel, without namespaces, template arguments and XLA's numbers.
        start: In ns.
        end: In ns.
    """

    name: str
    start: float
    end: float


def profile(step: Callable[[State], State], state: State) -> tuple[list[Event], State]:
    """Runs a compiled step a few times; returns its kernels in order of start, and the state."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED_STEPS):
                state = step(state)
            jax.block_until_ready(state)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        return sorted(_events(planes), key=lambda event: event.start), state


def layer_kernels(events: list[Event]) -> list[dict[str, object]]:
    """The kernels of one layer from its attention on, with the time each one adds.

    A kernel adds the time from the end of all before it, or from its own start where that is later,
    to its end: what runs beside others is not counted twice. Layers of the most frequent sequence
    of kernels count, each time is their median.
    """
    begins = [i for i, event in enumerate(events) if event.name.startswith("decode")]
    names = [event.name for event in events]
    added = _added(events)
    layers = list(itertools.pairwise(begins))
    sequences = collections.Counter(tuple(names[i:j]) for i, j in layers)
    if not sequences:
        return []
    ((sequence, _),) = sequences.most_common(1)
    times = zip(*(added[i:j] for i, j in layers if tuple(names[i:j]) == sequence), strict=True)
    return [
        {"kernel": name, "us": statistics.median(each) / 1e3}
        for name, each in zip(sequence, times, strict=True)
    ]


def kind(kernel: str) -> str:
    """What a kernel is for: "attention", "products" (the projections) or "small kernels"."""
    if kernel.startswith(("decode", "combine")):
        return "attention"
    return "products" if kernel.startswith(("gemm", "nvjet", "queries")) else "small kernels"


def text(kernels: list[dict[str, object]]) -> str:
    """The kernels in one line."""
    return ", ".join(f"{kernel['kernel']} {kernel['us']:.1f}" for kernel in kernels)


def _added(events: list[Event]) -> list[float]:
    last, added = 0.0, []
    for event in events:
        added.append(max(0.0, event.end - max(last, event.start)))
        last = max(last, event.end)
    return added


def _events(planes: object) -> list[Event]:
    return [
        Event(short_name(event.name), event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def short_name(name: str) -> str:
    """Such as decode_kernel, append_kernel, gemm_fusion_dot."""
    plain = re.split(r"[<(]", name.replace("(anonymous namespace)", ""))[0]
    return re.sub(r"(_\d+)+$", "", plain.split("::")[-1].removeprefix("void "))
