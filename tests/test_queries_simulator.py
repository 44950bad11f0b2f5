"""The barriers of the queries' kernel under random interleavings: no race, no hang.

Deliberate mistakes show that the simulator finds what goes wrong.
"""

import dataclasses

import pytest
from barrier_machine import NO_FAULTS, Faults, Step, Violation
from queries_simulator import MathWarp, ProducerWarp, Shape, simulate

SHAPES = {
    "a block on its own": Shape(splits=1, steps=7, tiles=8),
    "fewer steps than stages": Shape(splits=1, steps=1, tiles=8),
    "a product down": Shape(splits=1, steps=5, tiles=0, is_down=True),
    "two blocks": Shape(splits=2, steps=5, tiles=4),
    "two blocks, a short ring": Shape(splits=2, steps=1, tiles=4, stages=2),
    "three blocks, a product down": Shape(splits=3, steps=2, tiles=0, is_down=True),
    "four blocks": Shape(splits=4, steps=2, tiles=2),
    "four blocks under compute-sanitizer": Shape(splits=4, steps=7, tiles=2, meets_at_waits=True),
    "four groups": Shape(splits=2, steps=2, tiles=4, groups=4),
}
SEEDS = 12
MISTAKEN = [SHAPES["two blocks"], SHAPES["four blocks"], SHAPES["a block on its own"]]


@pytest.mark.parametrize("name", SHAPES)
def test_protocol_holds(name: str) -> None:
    for seed in range(SEEDS):
        simulate(SHAPES[name], seed)


def found(
    faults: Faults = NO_FAULTS,
    math_warp: type[MathWarp] = MathWarp,
    producer_warp: type[ProducerWarp] = ProducerWarp,
) -> str:
    """Returns what the simulator says about a mistake, '' if the interleavings hide it."""
    for seed in range(40):
        for shape in MISTAKEN:
            try:
                simulate(shape, seed, faults, math_warp, producer_warp)
            except Violation as violation:
                return str(violation)
    return ""


@pytest.mark.parametrize(
    "step",
    [
        *(
            f"wait {name}"
            for name in ("full", "empty", "columns_ready", "queries_ready", "may_leave", "cluster")
        ),
        *(f"wait {name}" for name in ("meet", "group_meet")),
        *(
            f"arrive {name}"
            for name in ("empty", "may_leave", "cluster", "meet", "group_meet", "begun")
        ),
        *(f"fence {name}" for name in ("columns", "queries")),
    ],
)
def test_a_missing_step_is_found(step: str) -> None:
    assert found(Faults(skipped=(step,)))


@pytest.mark.parametrize(
    ("barrier", "arrivals"),
    [
        ("full", 2),
        ("empty", 11),
        ("empty", 13),
        ("meet", 11),
        ("cluster", 25),
        ("begun", 12),
        ("may_leave", 2),
    ],
)
def test_a_wrong_arrival_count_is_found(barrier: str, arrivals: int) -> None:
    assert found(Faults(arrivals=((barrier, arrivals),)))


class TellsEarly(MathWarp):
    """A warp tells the others that their copies have ended before it knows."""

    def give_columns(self) -> Step:
        yield from super().give_columns()
        yield from super().release_others()

    def release_others(self) -> Step:
        yield from ()


class WaitsLate(MathWarp):
    """A warp waits for the cluster only where it needs it, behind what needs the producer."""

    def wait_until_begun(self) -> Step:
        yield from ()

    def project(self) -> Step:
        yield from super().project()
        yield from super().wait_until_begun()


class HastyOut(MathWarp):
    """q_latent is stored where columns may still be on their way to another block."""

    def add(self) -> Step:
        yield from super().add()
        for region in self.out(self.warp):
            yield from self.m.write(region, ("out", 0))


class LoneQueries(MathWarp):
    """A warp gives the sums away before the others of its block have theirs."""

    def add(self) -> Step:
        yield from super().add()
        yield from self.give_sums()


def test_a_mistaken_role_is_found() -> None:
    assert found(math_warp=HastyOut)
    assert found(math_warp=LoneQueries)
    assert found(math_warp=TellsEarly)


def test_a_late_wait_is_found_as_by_compute_sanitizer() -> None:
    shape = SHAPES["two blocks"]
    for seed in range(SEEDS):
        simulate(shape, seed, math_warp=WaitsLate)  # otherwise it is right
        with pytest.raises(Violation, match="deadlock"):
            simulate(dataclasses.replace(shape, meets_at_waits=True), seed, math_warp=WaitsLate)
