"""The schedule: the numbers of its definition, and what they have to guarantee."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jax_flashmla
from jax_flashmla import _dispatch
from jax_flashmla.schedule import (
    MAX_CANDIDATE_BATCH,
    MERGE_COST,
    PIECE_COST,
    REQUEST_COST,
    SHARE_CANDIDATES,
    SMOOTH_SPLITS,
    default_num_sm_parts,
    plan,
)

LONGEST = 2**31 - 1


def pages_of(lengths: list[int]) -> list[int]:
    """Pages per request as the schedule counts them, in unbounded integers."""
    cap = (LONGEST - SHARE_CANDIDATES) // len(lengths) - REQUEST_COST
    return [min(-(-max(length, 0) // 64), cap) for length in lengths]


def split_count(start: int, end: int, share: int) -> int:
    """Pieces of the request on [start, end) of the line: cuts at multiples of the share, behind
    its first page."""
    cuts = range(share * ((start + REQUEST_COST) // share + 1), end, share)
    return 1 + len(cuts)


def parts_apart(pages: list[int], share: int) -> list[int]:
    """The parts of its own that each request takes."""
    return [max(1, -(-count // share)) for count in pages]


def best_cutting(pages: list[int], starts: list[int], parts: int) -> tuple[int, bool]:
    """The candidate that costs least, summed over the parts, and whether requests stand apart.

    The first of equal ones; of a share's two ways apart.
    """
    least = -(-starts[-1] // parts)
    first = {False: least, True: max(1, least - REQUEST_COST)}
    batch = len(pages)
    if batch > MAX_CANDIDATE_BATCH:
        return least, False

    def cost(candidate: tuple[int, bool]) -> float:
        share, apart = candidate
        if apart:
            splits = parts_apart(pages, share)
        else:
            splits = [split_count(*ends, share) for ends in itertools.pairwise(starts)]
        pieces = sum(splits)
        if apart and pieces > parts:
            return float("inf")
        merge = MERGE_COST if pieces > batch else 0
        twice = any(n > SMOOTH_SPLITS and n.bit_count() > 1 for n in splits)
        return (share - least + merge) * parts + twice * (parts // 2) + PIECE_COST * pieces

    candidates = itertools.product(range(SHARE_CANDIDATES), (True, False))
    return min(((first[apart] + c, apart) for c, apart in candidates), key=cost)


def expected(lengths: list[int], parts: int) -> tuple[list[list[int]], list[int]]:
    """The definition with unbounded integers, request by request and part by part."""
    pages = pages_of(lengths)
    starts = [0]
    for count in pages:
        starts.append(starts[-1] + REQUEST_COST + count)
    share, apart = best_cutting(pages, starts, parts)
    return (
        expected_apart(pages, share, parts) if apart else expected_row(pages, starts, share, parts)
    )


def expected_apart(pages: list[int], share: int, parts: int) -> tuple[list[list[int]], list[int]]:
    """Each request by its own parts, of `share` pages."""
    cuts = [
        (request, k * share, k)
        for request, count in enumerate(parts_apart(pages, share))
        for k in range(count)
    ]
    cuts += [(len(pages), 0, 0)] * (parts + 1 - len(cuts))
    rows = [[*begin[:2], *end[:2], begin[2], 0, 0, 0] for begin, end in itertools.pairwise(cuts)]
    return rows, [0, *itertools.accumulate(parts_apart(pages, share))]


def expected_row(
    pages: list[int], starts: list[int], share: int, parts: int
) -> tuple[list[list[int]], list[int]]:
    """Cuts at multiples of the share."""

    def boundary(part: int) -> tuple[int, int, int]:
        cut = part * share
        if cut >= starts[-1]:
            return len(pages), 0, 0
        request = max(r for r in range(len(pages)) if starts[r] <= cut)
        page = max(0, cut - starts[request] - REQUEST_COST)
        return request, page, part - (starts[request] + REQUEST_COST) // share if page else 0

    rows = []
    for part in range(parts):
        (begin, begin_page, split), (end, end_page, _) = boundary(part), boundary(part + 1)
        rows.append([begin, begin_page, end, end_page, split, 0, 0, 0])
    num_splits = [0]
    for start, end in itertools.pairwise(starts):
        crossed = (end - 1) // share - (start + REQUEST_COST) // share
        num_splits.append(num_splits[-1] + 1 + max(0, crossed))
    return rows, num_splits


jitted_plan = jax.jit(plan, static_argnums=1)


def planned(lengths: list[int], parts: int) -> tuple[np.ndarray, np.ndarray]:
    schedule = jitted_plan(jnp.asarray(lengths, jnp.int32), parts)
    return np.asarray(schedule.tile_scheduler_metadata), np.asarray(schedule.num_splits)


def walk(rows: np.ndarray, pages: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """What each part does: pieces (request, first page, page after the last, split)."""
    work = []
    for begin, begin_page, end, end_page, begin_split, *_ in rows.tolist():
        pieces = []
        for request in range(begin, min(end + 1, len(pages))):
            first = begin_page if request == begin else 0
            last = end_page if request == end else pages[request]
            if request < end or end_page > 0:
                pieces.append((request, first, last, begin_split if request == begin else 0))
        work.append(pieces)
    return work


LENGTH = st.one_of(
    st.sampled_from([-5, 0, 1, 64, 65]), st.integers(0, 3000), st.integers(0, 200000)
)
LENGTHS = st.sampled_from([1, 2, 5, 12]).flatmap(
    lambda batch: st.lists(LENGTH, min_size=batch, max_size=batch)
)
PARTS = st.sampled_from([1, 3, 7, 132])


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, parts=PARTS)
@example(lengths=[LONGEST], parts=132)
@example(lengths=[LONGEST] * 3, parts=7)
@example(lengths=[-(2**31), LONGEST, 0], parts=1)
@example(lengths=[0] * 9, parts=3)
def test_numbers_of_the_definition(lengths: list[int], parts: int) -> None:
    rows, num_splits = planned(lengths, parts)
    want_rows, want_splits = expected(lengths, parts)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_array_equal(num_splits, want_splits)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, parts=PARTS)
@example(lengths=[0] * 9, parts=3)
@example(lengths=[64 * 500], parts=132)
@example(lengths=[1], parts=132)
def test_every_page_is_done_once_and_splits_are_numbered(lengths: list[int], parts: int) -> None:
    pages = pages_of(lengths)
    rows, num_splits = planned(lengths, parts)
    done: dict[int, list[tuple[int, int, int]]] = {r: [] for r in range(len(pages))}
    for pieces in walk(rows, pages):
        for request, first, last, split in pieces:
            done[request].append((split, first, last))
    for request, pieces in done.items():
        splits, firsts, lasts = zip(*sorted(pieces), strict=True)
        assert splits == tuple(range(len(pieces)))  # also of a request without pages: one piece
        assert len(pieces) == num_splits[request + 1] - num_splits[request]
        assert firsts == (0, *lasts[:-1])
        assert lasts[-1] == pages[request]
        assert all(last > first for first, last in zip(firsts, lasts, strict=True)) or lasts == (0,)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, parts=PARTS)
def test_no_part_gets_more_than_its_share(lengths: list[int], parts: int) -> None:
    pages = pages_of(lengths)
    rows, _ = planned(lengths, parts)
    total = sum(pages) + REQUEST_COST * len(pages)
    share = -(-total // parts)
    for pieces in walk(rows, pages):
        cost = sum(last - first for _, first, last, _ in pieces)
        own = [request for request, first, _, _ in pieces if first == 0]
        assert cost + REQUEST_COST * len(own) <= share + REQUEST_COST + SHARE_CANDIDATES - 1


@pytest.mark.parametrize(("batch", "length", "parts"), [(64, 4096, 66), (128, 1024, 66), (9, 0, 3)])
def test_requests_stay_whole_where_that_costs_little(batch: int, length: int, parts: int) -> None:
    _, num_splits = planned([length] * batch, parts)
    np.testing.assert_array_equal(num_splits, np.arange(batch + 1))


@pytest.mark.parametrize(
    ("batch", "length", "parts", "splits"),
    [(16, 4096, 132, 8), (4, 16384, 66, 16), (2, 6400, 4, 2)],
)
def test_requests_stand_apart_where_there_are_parts_enough(
    batch: int, length: int, parts: int, splits: int
) -> None:
    pages = pages_of([length] * batch)
    rows, num_splits = planned([length] * batch, parts)
    np.testing.assert_array_equal(np.diff(num_splits), splits)
    assert all(len(pieces) <= 1 for pieces in walk(rows, pages))


@pytest.mark.parametrize(
    ("batch", "length", "parts", "splits"),
    [(1, 16384, 132, 128), (1, 12288, 132, 64), (2, 8192, 132, 64), (1, 8192, 66, 64)],
)
def test_many_splits_are_a_power_of_two_where_that_costs_little(
    batch: int, length: int, parts: int, splits: int
) -> None:
    _, num_splits = planned([length] * batch, parts)
    np.testing.assert_array_equal(np.diff(num_splits), splits)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, parts=PARTS)
@example(lengths=[4096] * 16, parts=132)
@example(lengths=[4096] * 40, parts=33)
def test_the_parts_of_a_split_request_are_neighbours(lengths: list[int], parts: int) -> None:
    """The merge shares a request's rows out by that: cuda/combine/share.cuh."""
    rows, num_splits = planned(lengths, parts)
    work = walk(rows, pages_of(lengths))
    for request in np.flatnonzero(np.diff(num_splits) > 1).tolist():
        pieces = [(p, k) for p, done in enumerate(work) for r, _, _, k in done if r == request]
        first = pieces[0][0]
        assert pieces == [
            (first + k, k) for k in range(num_splits[request + 1] - num_splits[request])
        ]
        begins = [(p, rows[p][4]) for p, _ in pieces if rows[p][0] == request]
        assert begins[-(len(pieces) - 1) :] == pieces[1:]  # all but perhaps the first begin with it
        assert len(begins) == len(pieces) - (rows[first][0] != request)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, parts=PARTS)
def test_workspace_slots_are_bounded_and_apart(lengths: list[int], parts: int) -> None:
    _, num_splits = planned(lengths, parts)
    slots = [
        2 * (first - request) + k
        for request, (first, last) in enumerate(itertools.pairwise(num_splits))
        for k in range(last - first)
        if last - first > 1
    ]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < 2 * parts


def test_more_parts_than_work_leaves_idle_parts() -> None:
    rows, num_splits = planned([64, 0], 132)
    idle = rows[:, 0] == 2
    assert idle.sum() >= 129
    np.testing.assert_array_equal(rows[idle, :5], np.tile([2, 0, 2, 0, 0], (idle.sum(), 1)))
    np.testing.assert_array_equal(num_splits, [0, 1, 2])


@pytest.mark.parametrize(
    ("rows", "h_kv", "parts"),
    [
        (1, 1, 132),
        (64, 1, 132),
        (65, 1, 66),
        (128, 1, 66),
        (256, 1, 33),
        (16, 8, 16),
        (64 * 200, 1, 1),
    ],
)
def test_default_parts_fill_the_gpu_once(
    rows: int, h_kv: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    assert default_num_sm_parts(rows, h_kv) == parts
    assert jax_flashmla.get_mla_metadata(jnp.zeros(2, jnp.int32), rows, h_kv)[0].shape[0] == parts


def test_an_empty_batch_gives_an_empty_schedule() -> None:
    metadata, num_splits = jax_flashmla.get_mla_metadata(
        jnp.zeros(0, jnp.int32), 16, 1, num_sm_parts=5
    )
    np.testing.assert_array_equal(np.asarray(metadata), np.zeros((5, 8), np.int32))
    np.testing.assert_array_equal(np.asarray(num_splits), [0])
