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


def time_steps(
    step: Callable[[State], State], state: State, *, repeats: int, seconds: float
) -> tuple[Seconds, State]:
    """Times ``state = step(state)`` back to back.

    Steps are dispatched without waiting, so that the device never idles once the first one runs,
    and awaited once per repeat: what remains of that wait is divided by many steps.

    Args:
        step: A compiled function. Its first run is not timed.
        state: What goes in; it may be donated.
        repeats: How often to measure.
        seconds: Roughly how long each repeat lasts.

    Returns:
        The time of one step, and the last state.
    """
    state = jax.block_until_ready(step(state))
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    steps = max(1, min(1000, round(seconds / (time.perf_counter() - start))))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state)
        jax.block_until_ready(state)
        taken.append((time.perf_counter() - start) / steps)
    return Seconds(statistics.median(taken), min(taken), max(taken)), state
