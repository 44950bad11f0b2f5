"""The page allocator, held against a naive model that keeps each request's tokens as a list."""

import pathlib
import subprocess
import sys
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jax_flashmla import _shapes, pages
from jax_flashmla.pages import OutOfPages, PagePool, RequestExists, TableTooNarrow, UnknownRequest

PAGE = pages.PAGE_SIZE
NAMES = st.integers(0, 5)
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 3 * PAGE), st.sampled_from([PAGE - 1, PAGE]))


def write(pool: np.ndarray, writes: pages.Writes, tokens: list[list[int]]) -> None:
    """Does to ``pool`` [num_pages, page_size] what an append asks of the caller."""
    for source, destination in writes.copies:
        if destination >= 0:
            pool[destination] = pool[source]
    for slots, row in zip(writes.slots, tokens, strict=True):
        assert (slots[len(row) :] == -1).all()
        pool.reshape(-1)[slots[: len(row)]] = row


def read(pool: np.ndarray, rows: pages.Rows, row: int) -> list[int]:
    length = rows.cache_seqlens[row]
    owned = rows.block_table[row][: -(-length // PAGE)]
    return pool[owned].reshape(-1)[:length].tolist()


def state(allocator: PagePool) -> tuple[object, ...]:
    rows = allocator.rows(allocator.requests)
    return (
        allocator.requests,
        allocator.free_pages,
        rows.block_table.tolist(),
        rows.cache_seqlens.tolist(),
    )


class Serving(RuleBasedStateMachine):
    """Any sequence of calls, refused ones among them."""

    @initialize(num_pages=st.integers(1, 16), max_pages_per_seq=st.integers(1, 6))
    def start(self, num_pages: int, max_pages_per_seq: int) -> None:
        self.allocator = PagePool(num_pages, max_pages_per_seq=max_pages_per_seq)
        self.num_pages, self.width = num_pages, max_pages_per_seq
        self.pool = np.full((num_pages, PAGE), -1)
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 0

    def refused(
        self, error: type[Exception], call: object, *given: object, **named: object
    ) -> None:
        before = state(self.allocator)
        with pytest.raises(error):
            call(*given, **named)
        assert state(self.allocator) == before

    @rule(name=NAMES)
    def add(self, name: int) -> None:
        if name in self.tokens:
            self.refused(RequestExists, self.allocator.add, name)
        else:
            self.allocator.add(name)
            self.tokens[name] = []

    @rule(source=NAMES, name=NAMES, kept=st.floats(0, 1), past=st.booleans())
    def fork(self, source: int, name: int, kept: float, past: bool) -> None:
        if source not in self.tokens:
            self.refused(UnknownRequest, self.allocator.fork, source, name)
        elif name in self.tokens:
            self.refused(RequestExists, self.allocator.fork, source, name)
        elif past:
            many = len(self.tokens[source]) + 1
            self.refused(ValueError, self.allocator.fork, source, name, tokens=many)
        else:
            free, count = self.allocator.free_pages, round(kept * len(self.tokens[source]))
            self.allocator.fork(source, name, tokens=count)
            self.tokens[name] = self.tokens[source][:count]
            assert self.allocator.free_pages == free

    @rule(counts=st.dictionaries(NAMES, COUNTS, max_size=4), slack=st.integers(0, 2))
    def append(self, counts: dict[int, int], slack: int) -> None:
        call = self.allocator.append
        if counts.keys() - self.tokens.keys():
            return self.refused(UnknownRequest, call, counts)
        lengths = {name: len(self.tokens[name]) for name in counts}
        if any(lengths[name] + count > self.width * PAGE for name, count in counts.items()):
            return self.refused(TableTooNarrow, call, counts)
        needed = self.needed(counts)
        if needed > self.allocator.free_pages:
            return self.refused(OutOfPages, call, counts)

        free, tables = self.allocator.free_pages, self.tables()
        batch, width = len(counts) + slack, max(counts.values(), default=0) + slack
        writes = call(counts, batch=batch, width=width)
        assert writes.slots.dtype == writes.copies.dtype == np.int32
        assert writes.slots.shape == (batch, width)
        assert writes.copies.shape == (batch, 2)
        assert self.allocator.free_pages == free - needed
        owned = {page for table in tables.values() for page in table}
        copies = [pair for pair in writes.copies.tolist() if pair != [-1, -1]]
        assert all(source in owned and destination not in owned for source, destination in copies)

        new = []
        for name, count in counts.items():
            new.append(list(range(self.next_token, self.next_token + count)))
            self.next_token += count
            self.tokens[name] = self.tokens[name] + new[-1]
        write(self.pool, writes, new + [[]] * slack)
        return None

    @rule(name=NAMES, dropped=st.integers(0, 2 * PAGE))
    def rewind(self, name: int, dropped: int) -> None:
        if name not in self.tokens:
            self.refused(UnknownRequest, self.allocator.rewind, name, dropped)
        elif dropped > len(self.tokens[name]):
            self.refused(ValueError, self.allocator.rewind, name, dropped)
        else:
            self.allocator.rewind(name, dropped)
            self.tokens[name] = self.tokens[name][: len(self.tokens[name]) - dropped]

    @rule(name=NAMES)
    def release(self, name: int) -> None:
        if name in self.tokens:
            self.allocator.release(name)
            del self.tokens[name]
        else:
            self.refused(UnknownRequest, self.allocator.release, name)

    def tables(self) -> dict[int, list[int]]:
        rows = self.allocator.rows(list(self.tokens))
        return {
            name: [page for page in table if page >= 0]
            for name, table in zip(self.tokens, rows.block_table.tolist(), strict=True)
        }

    def needed(self, counts: dict[int, int]) -> int:
        """New pages, and one copy for each request but the last owner of a shared last page."""
        tables = self.tables()
        owners = Counter(page for table in tables.values() for page in table)
        fresh, writers = 0, Counter()
        for name, count in counts.items():
            length = len(self.tokens[name])
            fresh += -(-(length + count) // PAGE) - len(tables[name])
            if count and length % PAGE:
                writers[tables[name][-1]] += 1
        return fresh + sum(min(many, owners[page] - 1) for page, many in writers.items())

    @invariant()
    def every_request_reads_its_own_tokens(self) -> None:
        rows = self.allocator.rows(list(self.tokens), batch=7)
        assert rows.block_table.shape == (7, self.width)
        assert rows.block_table.dtype == rows.cache_seqlens.dtype == np.int32
        assert (rows.cache_seqlens[len(self.tokens) :] == 0).all()
        for row, (name, tokens) in enumerate(self.tokens.items()):
            assert self.allocator.length(name) == rows.cache_seqlens[row] == len(tokens)
            assert (rows.block_table[row, -(-len(tokens) // PAGE) :] == -1).all()
            assert read(self.pool, rows, row) == tokens

    @invariant()
    def every_page_is_free_or_owned_as_often_as_counted(self) -> None:
        tables = self.tables()
        assert all(len(set(table)) == len(table) for table in tables.values())
        owners = Counter(page for table in tables.values() for page in table)
        counted = [self.allocator.owners(page) for page in range(self.num_pages)]
        assert counted == [owners[page] for page in range(self.num_pages)]
        assert self.allocator.free_pages == counted.count(0)

    def teardown(self) -> None:
        """Every free page is there to take, once."""
        if not hasattr(self, "allocator"):
            return
        taken = []
        for number in range(self.allocator.free_pages):
            self.allocator.add(("last", number))
            taken += self.allocator.append({("last", number): 1}).slots[0].tolist()
        owned = {page for table in self.tables().values() for page in table}
        assert sorted(owned | {slot // PAGE for slot in taken}) == list(range(self.num_pages))


Serving.TestCase.settings = hypothesis.settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
TestServing = Serving.TestCase


def test_append_to_a_shared_partly_filled_page_moves_all_but_its_last_owner() -> None:
    allocator = PagePool(8, max_pages_per_seq=4)
    allocator.add("a")
    allocator.append({"a": PAGE + 10})
    allocator.fork("a", "b")
    allocator.fork("a", "c")
    writes = allocator.append({"a": 1, "b": 1, "c": 1})
    assert writes.copies.tolist() == [[1, 2], [1, 3], [-1, -1]]
    assert writes.slots.tolist() == [[2 * PAGE + 10], [3 * PAGE + 10], [PAGE + 10]]
    assert allocator.owners(0) == 3


def test_append_behind_a_full_shared_page_copies_nothing() -> None:
    allocator = PagePool(4, max_pages_per_seq=4)
    allocator.add("a")
    allocator.append({"a": PAGE})
    allocator.fork("a", "b")
    assert allocator.append({"b": 1}).copies.tolist() == [[-1, -1]]


def test_rewind_into_a_shared_page_then_append_leaves_the_other_request_alone() -> None:
    allocator = PagePool(4, max_pages_per_seq=4)
    pool = np.full((4, PAGE), -1)
    allocator.add("a")
    write(pool, allocator.append({"a": 100}), [list(range(100))])
    allocator.fork("a", "b")
    allocator.rewind("a", 60)
    writes = allocator.append({"a": 2})
    assert writes.copies.tolist() == [[0, 2]]
    write(pool, writes, [[1000, 1001]])
    rows = allocator.rows(["a", "b"])
    assert read(pool, rows, 0) == [*range(40), 1000, 1001]
    assert read(pool, rows, 1) == list(range(100))


def test_the_last_free_pages_can_be_taken_and_no_more() -> None:
    allocator = PagePool(2, max_pages_per_seq=4)
    allocator.add("a")
    allocator.append({"a": 2 * PAGE})
    with pytest.raises(OutOfPages, match="needs 1, 0 are free") as caught:
        allocator.append({"a": 1})
    assert (caught.value.needed, caught.value.free) == (1, 0)
    assert allocator.length("a") == 2 * PAGE


@pytest.mark.parametrize(
    ("tokens", "named", "message"),
    [
        ({"a": 2, "b": 1}, {"batch": 1}, "batch: got 1, expected at least 2"),
        ({"a": 2}, {"width": 1}, "width: got 1, expected at least 2"),
        ({"a": 1, "b": -1}, {}, "tokens: got -1 for request 'b'"),
        ({"a": 1, "b": 4 * PAGE + 1}, {}, "need 5 pages, max_pages_per_seq is 4"),
        ({"a": 1, "z": 1}, {}, "no request 'z'"),
    ],
)
def test_refused_append_changes_nothing(
    tokens: dict[str, int], named: dict[str, int], message: str
) -> None:
    allocator = PagePool(8, max_pages_per_seq=4)
    allocator.add("a")
    allocator.add("b")
    before = state(allocator)
    with pytest.raises(ValueError, match=message):
        allocator.append(tokens, **named)
    assert state(allocator) == before


def test_count_that_is_no_whole_number_changes_nothing() -> None:
    allocator = PagePool(8, max_pages_per_seq=4)
    allocator.add("a")
    before = state(allocator)
    for call in (
        lambda: allocator.append({"a": 1.5}),
        lambda: allocator.rewind("a", 0.5),
        lambda: allocator.fork("a", "b", tokens=0.5),
    ):
        with pytest.raises(TypeError):
            call()
    assert state(allocator) == before


@pytest.mark.parametrize(
    ("num_pages", "max_pages_per_seq", "name"),
    [(0, 1, "num_pages"), (2**25 + 1, 1, "num_pages"), (1, 0, "max_pages_per_seq")],
)
def test_sizes_are_checked(num_pages: int, max_pages_per_seq: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        PagePool(num_pages, max_pages_per_seq=max_pages_per_seq)


def test_batch_of_rows_is_checked() -> None:
    allocator = PagePool(1, max_pages_per_seq=1)
    allocator.add("a")
    with pytest.raises(ValueError, match="batch: got 0"):
        allocator.rows(["a"], batch=0)


def test_page_size_is_the_kernels() -> None:
    assert pages.PAGE_SIZE == _shapes.PAGE_SIZE


def test_file_needs_no_jax() -> None:
    path = pathlib.Path(pages.__file__)
    program = f"import runpy, sys; runpy.run_path({str(path)!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_readme_example_runs() -> None:
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    section = readme.read_text(encoding="utf-8").split("\n## Pages\n")[1]
    names: dict[str, object] = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    assert names["writes"].copies.tolist() == [[1, 2]] + [[-1, -1]] * 7
    assert names["rows"].cache_seqlens.tolist() == [102, 101] + [0] * 6
    assert names["rows"].block_table.shape == (8, 64)
    assert names["pool"].free_pages == 998
