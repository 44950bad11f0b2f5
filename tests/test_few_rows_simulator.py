"""The barriers of the decode kernel for few rows under random interleavings: no race, no hang.

Deliberate mistakes show that the simulator finds what goes wrong.
"""

import random

import pytest
from barrier_layout import Item
from barrier_machine import NO_FAULTS, Faults, Step, Violation
from few_rows_layout import CONSTANTS, PARTS, VALUE_WARPS, slot_of
from few_rows_simulator import Reading, ScoresWarp, ValuesWarp, simulate

ITEM_LISTS = {
    "nothing": [],
    "empty requests": [Item(0)] * 5,
    "empty requests between": [Item(1), Item(0), Item(1, tail=True), Item(0), Item(0), Item(2)],
    "one page": [Item(1, tail=True)],
    "single pages": [Item(1, tail=True)] * 6,
    "mixed": [Item(3, tail=True), Item(2), Item(1, tail=True), Item(5)],
    "a long split": [Item(13, split=True)],
    "short splits": [Item(1, split=True)] * 6,
}
GUESSES = (None, True, False, False)
SLOTS = sorted({CONSTANTS[f"slots_{rows}"] for rows in (8, 16, 24, 32)})
MIXED = [
    Item(3, tail=True, split=True),
    Item(0),
    Item(1),
    Item(1, tail=True, split=True),
    Item(4, tail=True),
    Item(2, split=True),
]
SHORT = [Item(pages, split=pages > 0) for pages in (0, 1, 0, 0, 1, 1, 0, 1, 1, 1)]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", ITEM_LISTS)
def test_protocol_holds(name: str, slots: int) -> None:
    for seed in range(30):
        simulate(ITEM_LISTS[name], seed, slots, guess=GUESSES[seed % len(GUESSES)])


@pytest.mark.parametrize("seed", range(10))
def test_protocol_holds_on_random_items(seed: int) -> None:
    rng = random.Random(seed)
    for interleaving in range(20):
        items = [
            Item(rng.choice([0, 1, 1, 2, 3, 4, 7]), rng.random() < 0.5, rng.random() < 0.5)
            for _ in range(6)
        ]
        simulate(items, interleaving, rng.choice(SLOTS), guess=rng.choice(GUESSES))


def found(
    faults: Faults = NO_FAULTS,
    scores_warp: type[ScoresWarp] = ScoresWarp,
    values_warp: type[ValuesWarp] = ValuesWarp,
) -> str:
    """Returns what the simulator says about a mistake, '' if the interleavings hide it."""
    for seed in range(60):
        for items in (MIXED, SHORT):
            slots, guess = SLOTS[seed % len(SLOTS)], GUESSES[seed % len(GUESSES)]
            try:
                simulate(items, seed, slots, faults, scores_warp, values_warp, guess)
            except Violation as violation:
                return str(violation)
    return ""


@pytest.mark.parametrize(
    "step",
    [
        *(f"wait {name}" for name in ("part_full", "part_empty", "query_full", "query_empty")),
        *(f"wait {name}" for name in ("weights_ready", "sums_ready", "score_warps", "value_warps")),
        "wait first_known",
        "arrive first_known",
        *(f"arrive {name}" for name in ("part_empty", "query_full", "query_empty")),
        *(f"arrive {name}" for name in ("weights_ready", "sums_ready", "score_warps")),
        "arrive value_warps",
        *(f"fence {name}" for name in ("tail", "weights", "out")),
    ],
)
def test_a_missing_step_is_found(step: str) -> None:
    assert found(Faults(skipped=(step,)))


@pytest.mark.parametrize(
    ("barrier", "arrivals"),
    [
        ("part_full", 2),
        ("part_empty", 7),
        ("part_empty", 9),
        ("query_full", 1),
        ("query_empty", 8),
        ("query_empty", 11),
        ("weights_ready", 4),
        ("weights_ready", 12),
        ("sums_ready", 12),
        ("score_warps", 3),
        ("value_warps", 7),
    ],
)
def test_a_wrong_arrival_count_is_found(barrier: str, arrivals: int) -> None:
    assert found(Faults(arrivals=((barrier, arrivals),)))


@pytest.mark.parametrize("name", ["page_max", "factors", "row_sum", "query", "assignment"])
def test_a_single_buffer_is_found(name: str) -> None:
    assert found(Faults(buffers=((name, 1),)))


class EarlyPart(ValuesWarp):
    """A page's parts are freed before their WGMMA have read them."""

    def finish_page(self, reading: list[Reading]) -> Step:
        for slot in self.part_slots():
            yield from self.m.arrive("part_empty", slot)
        for regions in reading:
            self.m.end_read(regions)


class EarlyValues(ValuesWarp):
    """The values free an item's query, and its sums, before they have read the sums."""

    def wait_for_sums(self, i: int) -> Step:
        yield from self.m.arrive("query_empty", i % 2)
        yield from super().wait_for_sums(i)


class EarlyQuery(ScoresWarp):
    """The query is freed before the item's last page."""

    def compute(self, i: int) -> Step:
        if self.page == 2:
            yield from super().release_query(i)
        yield from super().compute(i)

    def release_query(self, i: int) -> Step:
        if i > 0:
            yield from super().release_query(i)


class ForgottenSums(ScoresWarp):
    """An item without sums of its own is not handed over."""

    def end_item(self, i: int) -> Step:
        if i != 1:
            yield from super().end_item(i)


class LoneScale(ValuesWarp):
    """A split's rows are scaled by the warp's own columns before the others have told theirs."""

    def tell_magnitudes(self, i: int) -> Step:
        for w in VALUE_WARPS:
            if w != self.warp:
                yield from self.read(self.m.region("magnitudes", w), ("most", i))
        yield from super().tell_magnitudes(i)


class EarlyRows(ValuesWarp):
    """An item's page is freed when the first of its rows are stored."""

    def store_block(self, i: int, block: int) -> Step:
        yield from super().store_block(i, block)
        if block == 0:
            yield from super().free_page()

    def free_page(self) -> Step:
        yield from ()


class HastyMath(ScoresWarp):
    """The first page is looked for where it lies if there was no wrong guess."""

    def place(self, part: int) -> tuple[int, int]:
        return slot_of(self.page * len(PARTS) + part, self.slots)


def test_a_mistaken_role_is_found() -> None:
    assert found(values_warp=EarlyPart)
    assert found(values_warp=LoneScale)
    assert found(values_warp=EarlyRows)
    assert found(values_warp=EarlyValues)
    assert found(scores_warp=EarlyQuery)
    assert found(scores_warp=HastyMath)
    assert found(scores_warp=ForgottenSums)
