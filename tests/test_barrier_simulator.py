"""The decode kernel's barriers under random interleavings: no race, no hang.

Deliberate mistakes show that the simulator finds what goes wrong.
"""

import random
from collections.abc import Callable

import pytest
from barrier_layout import LEFT, RIGHT, ROPE, Item
from barrier_machine import NO_FAULTS, Faults, Machine, Region, Step, Violation
from barrier_simulator import (
    MathWarp,
    assign,
    copy_queries,
    load_queries,
    request_query,
    simulate,
)

ITEM_LISTS = {
    "nothing": [],
    "an empty request": [Item(0)],
    "empty requests": [Item(0)] * 5,
    "empty requests between": [Item(1), Item(0), Item(1, tail=True), Item(0), Item(0), Item(2)],
    "one page": [Item(1, tail=True)],
    "two pages": [Item(2)],
    "odd counts": [Item(1), Item(3, tail=True), Item(1, tail=True), Item(5)],
    "single pages": [Item(1, tail=True)] * 6,
    "even counts": [Item(4), Item(2, tail=True), Item(2)],
    "a long split": [Item(13)],
}
IN_ORDER, ROPE_FIRST = (LEFT, RIGHT, ROPE), (ROPE, LEFT, RIGHT)
MIXED = [Item(3, tail=True), Item(0), Item(1), Item(1, tail=True), Item(4, tail=True), Item(2)]


@pytest.mark.parametrize("name", ITEM_LISTS)
def test_protocol_holds(name: str) -> None:
    for seed in range(60):
        simulate(ITEM_LISTS[name], seed)


def test_protocol_holds_with_copied_queries() -> None:
    for seed in range(200):
        simulate(MIXED, seed, query_loader=copy_queries)


@pytest.mark.parametrize("seed", range(10))
def test_protocol_holds_on_random_items(seed: int) -> None:
    rng = random.Random(seed)
    for interleaving in range(40):
        items = [Item(rng.choice([0, 1, 1, 2, 3, 4, 7]), rng.random() < 0.5) for _ in range(6)]
        simulate(items, interleaving)


def found(
    faults: Faults = NO_FAULTS,
    math_warp: type[MathWarp] = MathWarp,
    order: tuple[int, ...] = IN_ORDER,
    query_loader: Callable[[Machine, list[Item], int], Step] = load_queries,
) -> str:
    """Returns what the simulator says about a mistake, '' if a hundred interleavings hide it."""
    for seed in range(100):
        try:
            simulate(MIXED, seed, faults, math_warp, order, query_loader)
        except Violation as violation:
            return str(violation)
    return ""


@pytest.mark.parametrize(
    "step",
    [
        *(f"wait {name}" for name in ("page_full", "page_empty", "query_full", "query_empty")),
        *(f"wait {name}" for name in ("weights_ready", "sums_ready", "own_warps", "odd_scored")),
        *(f"arrive {name}" for name in ("page_empty", "query_full", "query_empty")),
        *(f"arrive {name}" for name in ("weights_ready", "sums_ready", "own_warps", "odd_scored")),
        *(f"fence {name}" for name in ("query", "tail", "weights")),
    ],
)
def test_a_missing_step_is_found(step: str) -> None:
    assert found(Faults(skipped=(step,)), query_loader=copy_queries)


@pytest.mark.parametrize("step", ["wait query_full", "wait query_empty", "arrive query_full"])
def test_a_missing_step_is_found_with_queries_by_tma(step: str) -> None:
    assert found(Faults(skipped=(step,)))


@pytest.mark.parametrize(
    ("barrier", "arrivals"),
    [
        ("page_full", 2),
        ("page_empty", 3),
        ("page_empty", 5),
        ("query_full", 2),
        ("query_empty", 4),
        ("query_empty", 7),
        ("weights_ready", 8),
        ("weights_ready", 24),
        ("sums_ready", 32),
        ("own_warps", 3),
        ("odd_scored", 3),
    ],
)
def test_a_wrong_arrival_count_is_found(barrier: str, arrivals: int) -> None:
    assert found(Faults(arrivals=((barrier, arrivals),)))


@pytest.mark.parametrize("name", ["row_sum", "assignment"])
def test_a_single_buffer_is_found(name: str) -> None:
    assert found(Faults(buffers=((name, 1),)))


class EarlyRope(MathWarp):
    """The left half frees the odd page's P before its WGMMA has read it."""

    def issue_other_values(self, n: int, weights: Region, tail: bool) -> Step:
        yield from super().issue_other_values(n, weights, tail)
        if self.half == LEFT:
            yield from super().release((n, ROPE))
            self.freed = n

    def release(self, *parts: tuple[int, int]) -> Step:
        yield from super().release(*(p for p in parts if p != (getattr(self, "freed", -1), ROPE)))


class EarlyPage(MathWarp):
    """A half frees its columns of a page once the WGMMA is issued."""

    def finish_values(self) -> Step:
        yield

    def end_item(self) -> Step:
        self.m.end_read(self.reading)
        yield from super().end_item()


class EarlyQuery(MathWarp):
    """The query tile is freed before the last pair of pages."""

    def release_query(self, item: Item, page: int) -> Step:
        del item
        if page == 0:
            yield from self.m.arrive("query_empty")


class EarlyReader(MathWarp):
    """The assignment is read before the loaders have said that it is there."""

    def begin_item(self) -> Step:
        yield from self.read_assignment()
        yield from self.m.wait("query_full", phase=self.item)


class SilentSkip(MathWarp):
    """An item without pages does not free its query, though none was loaded."""

    def skip_pages(self) -> Step:
        yield


class SumsByItem(MathWarp):
    """The parity of `sums_ready` flips for items without pages too."""

    def skip_pages(self) -> Step:
        yield from super().skip_pages()
        self.sums += 1


MISTAKEN = [EarlyPage, EarlyQuery, EarlyReader, SilentSkip, SumsByItem]


@pytest.mark.parametrize("mistaken", MISTAKEN)
def test_a_mistaken_role_is_found(mistaken: type[MathWarp]) -> None:
    assert found(math_warp=mistaken)


def assign_early(m: Machine, items: list[Item], loader: int) -> Step:
    """The assignment is written while the halves may still be two items back."""
    for i in range(len(items)):
        yield from assign(m, i, loader)
        yield from m.wait("query_empty", phase=i - 1)
        if loader == 0:
            yield from request_query(m, i)
        yield from m.arrive("query_full")


def assign_late(m: Machine, items: list[Item], loader: int) -> Step:
    """The assignment is written after `query_full`."""
    for i in range(len(items)):
        yield from m.wait("query_empty", phase=i - 1)
        if loader == 0:
            yield from request_query(m, i)
        yield from m.arrive("query_full")
        yield from assign(m, i, loader)


def skip_empty(m: Machine, items: list[Item], loader: int) -> Step:
    """Items without pages are not handed over."""
    yield from load_queries(m, [item for item in items if item.pages], loader)


@pytest.mark.parametrize("mistaken", [assign_early, assign_late, skip_empty])
def test_a_mistaken_query_loader_is_found(
    mistaken: Callable[[Machine, list[Item], int], Step],
) -> None:
    assert found(query_loader=mistaken)


def test_the_rope_tile_needs_its_barrier_only_where_it_is_not_asked_for_last() -> None:
    """A warp frees a page's rope tile with its columns, and the producer awaits those first."""
    assert not found(math_warp=EarlyRope)
    assert not found(order=ROPE_FIRST)
    assert found(math_warp=EarlyRope, order=ROPE_FIRST)
