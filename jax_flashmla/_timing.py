"""Time of a compiled step, without the cost of starting and awaiting it."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import jax

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds per step over the repeats: median, least, most."""

    median: float
    low: float
    high: float

    def per(self, parts: int) -> "Seconds":
        """The same for one of ``parts`` equal parts of a step."""
        return Seconds(self.median / parts, self.low / parts, self.high / parts)


def further_step(run: Callable[[int], None], steps: int) -> float:
    """Seconds of each of ``steps`` steps behind a first one.

    The time of a run of ``1 + steps`` less that of a run of one: starting and awaiting a run, which
    cancel out, take 1.2 ms through JAX on an H200, 3% of a run of 40 ms.

    Args:
        run: Starts that many steps back to back, and awaits them.
        steps: At least 1.
    """
    short, long = _seconds(run, 1), _seconds(run, 1 + steps)
    # Only where a step is no longer than the noise of a busy host.
    return (long - short) / steps if long > short else long / (1 + steps)


def _seconds(run: Callable[[int], None], steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def time_steps(
    step: Callable[[State], State], state: State, *, repeats: int, seconds: float
) -> tuple[Seconds, State]:
    """Times ``state = step(state)`` back to back.

    Steps are dispatched without waiting, so that the device never idles once the first one runs.

    Args:
        step: A compiled function. Its first run is not timed.
        state: What goes in; it may be donated.
        repeats: How often to measure.
        seconds: Roughly how long each repeat lasts.

    Returns:
        The time of one step, and the last state.
    """

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)

    run(1)
    steps = max(1, min(1000, round(seconds / _seconds(run, 1))))
    taken = [further_step(run, steps) for _ in range(repeats)]
    return Seconds(statistics.median(taken), min(taken), max(taken)), state
