"""Times several contenders on one row in turns, so that all meet the same state of the card."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Chain

from jax_flashmla._timing import Seconds, further_step


@dataclasses.dataclass(frozen=True)
class Lane:
    """A contender on a row, ready to run.

    Attributes:
        name: Of the contender.
        calls: Calls in one run.
        start: Starts a run.
        wait: Waits for all started runs.
        through_jax: Whether JAX starts the runs: the first one behind a rest and other contenders
            then takes the host a millisecond more.
    """

    name: str
    calls: int
    start: Callable[[], None]
    wait: Callable[[], None]
    through_jax: bool = False


@dataclasses.dataclass(frozen=True)
class Turns:
    """How a row is timed.

    Attributes:
        rounds: Turns of each contender; the median is over these.
        seconds: Length of a turn.
        rest: Idle time before it, for the card to recover from the turn before.
    """

    rounds: int
    seconds: float
    rest: float


# At full power the clock falls within tens of ms. Bursts behind rests run as the peers' table did:
# FA3's times over its table's were 0.95 to 1.00 on 13 of 15 rows, without rests 0.89 to 1.13.
BURSTS = Turns(rounds=5, seconds=0.02, rest=0.05)
SUSTAINED = Turns(rounds=5, seconds=0.06, rest=0.0)
QUICK = Turns(rounds=2, seconds=0.005, rest=0.0)


def chain_lane(name: str, chain: Chain) -> Lane:
    """A lane of a compiled chain; each run starts from the last one's ``out``."""
    # The queries go over the host: a copy on the device would be compiled for each shape.
    return stepping_lane(name, chain.calls, chain, jnp.array(np.asarray(chain.inputs.q_latent)))


def stepping_lane(name: str, calls: int, step: Callable[[Any], object], state: object) -> Lane:
    """A lane of a compiled step; each run starts from the last one's state, first `state`."""

    def start() -> None:
        nonlocal state
        state = step(state)

    def wait() -> None:
        jax.block_until_ready(state)

    return Lane(name, calls, start, wait, through_jax=True)


def interleave(lanes: Sequence[Lane], turns: Turns) -> dict[str, Seconds]:
    """Times one call of each lane, in rounds over all lanes."""
    once = {lane.name: _once(lane) for lane in lanes}
    taken: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    for number in range(turns.rounds):
        # Another one begins each round: nobody always follows the one that heats most.
        first = number % len(lanes)
        for lane in (*lanes[first:], *lanes[:first]):
            runs = max(1, min(2000, round(turns.seconds / once[lane.name])))
            time.sleep(turns.rest)
            # The millisecond would not cancel: chains in a jit seemed 5 to 10% faster than they
            # are. Others need no such run where it is long enough to heat the card.
            if lane.through_jax or once[lane.name] < turns.seconds / 8:
                _run(lane, 1)
            seconds = further_step(functools.partial(_run, lane), runs)
            taken[lane.name].append(seconds / lane.calls)
    return {
        name: Seconds(statistics.median(all_), min(all_), max(all_)) for name, all_ in taken.items()
    }


def _once(lane: Lane) -> float:
    """Seconds of one run, the first one left out."""
    _run(lane, 1)
    begin = time.perf_counter()
    _run(lane, 1)
    return time.perf_counter() - begin


def _run(lane: Lane, runs: int) -> None:
    for _ in range(runs):
        lane.start()
    lane.wait()
