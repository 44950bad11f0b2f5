"""Which page of the pool holds which token: a host-side allocator, NumPy only.

A request owns a list of pages and a length. Requests that begin alike share pages: each page counts
its owners and returns to the free list with the last one. Only a request's last page can be partly
filled; appending to it while others own it too first moves the request to a copy (copy on write).
The allocator never touches the cache: it says which pages to copy (`jax_flashmla.cache.copy_pages`)
and which slots to write (`jax_flashmla.cache.append`).

    pool = PagePool(num_pages, max_pages_per_seq=64)
    pool.add("a")
    writes = pool.append({"a": 3})          # slots of three tokens, and pages to copy before
    pool.fork("a", "b")                     # b shares a's tokens
    rows = pool.rows(["a", "b"], batch=8)   # block_table, cache_seqlens

The idea is vLLM's: block tables, reference counts and copy on write (Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023).
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

PAGE_SIZE = 64
MAX_PAGES = 2**31 // PAGE_SIZE  # slots are int32


class OutOfPages(Exception):  # noqa: N818  (a state to handle by waiting or evicting, no mistake)
    """Fewer pages are free than an append needs; nothing was changed.

    Attributes:
        needed: Pages the append would have taken.
        free: Pages there are.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"out of pages: the append needs {needed}, {free} are free")
        self.needed, self.free = needed, free


class TableTooNarrow(ValueError):  # noqa: N818
    """A request would outgrow ``max_pages_per_seq``; nothing was changed."""


class UnknownRequest(ValueError):  # noqa: N818
    """No request has this name; nothing was changed."""


class RequestExists(ValueError):  # noqa: N818
    """A request of this name exists; nothing was changed."""


@dataclasses.dataclass(frozen=True)
class Writes:
    """What the caller does to the cache for one append: the copies first, then the slots.

    Attributes:
        slots: int32 [batch, width], page * 64 + offset of each new token, -1 behind the last.
        copies: int32 [batch, 2], source and destination page, (-1, -1) behind the last. No page is
            both a source and a destination, so their order does not matter.
    """

    slots: np.ndarray
    copies: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """The arrays of a decode batch.

    Attributes:
        block_table: int32 [batch, max_pages_per_seq], -1 behind the last page.
        cache_seqlens: int32 [batch], 0 in rows without a request.
    """

    block_table: np.ndarray
    cache_seqlens: np.ndarray


@dataclasses.dataclass
class _Request:
    pages: list[int]
    length: int


@dataclasses.dataclass(frozen=True)
class _Growth:
    """What one request of an append takes: ``count`` tokens, ``fresh`` pages, a copy or not."""

    request: _Request
    count: int
    copied: bool
    fresh: int

    @property
    def taken(self) -> int:
        return self.fresh + self.copied


class PagePool:
    """Pages of one pool and the requests that own them.

    Requests are named by any hashable value. A call that raises has changed nothing.
    """

    def __init__(self, num_pages: int, *, max_pages_per_seq: int) -> None:
        """Starts with all pages free.

        Args:
            num_pages: Pages of the pool (of one layer, where layers share a flat one).
            max_pages_per_seq: Columns of a block table: the most pages a request may have.

        Raises:
            ValueError: A number is below 1, or int32 slots cannot name every token.
        """
        if not 1 <= num_pages <= MAX_PAGES:
            raise ValueError(f"num_pages: got {num_pages}, expected 1 to {MAX_PAGES}")
        if max_pages_per_seq < 1:
            raise ValueError(f"max_pages_per_seq: got {max_pages_per_seq}, expected at least 1")
        self._max_pages_per_seq = max_pages_per_seq
        self._free = list(range(num_pages - 1, -1, -1))  # taken from the end: page 0 first
        self._owners = [0] * num_pages
        self._requests: dict[Hashable, _Request] = {}

    @property
    def free_pages(self) -> int:
        """Pages that no request owns."""
        return len(self._free)

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """Names of all requests, oldest first."""
        return tuple(self._requests)

    def length(self, name: Hashable) -> int:
        """Tokens of a request.

        Raises:
            UnknownRequest: There is none of this name.
        """
        return self._find(name).length

    def owners(self, page: int) -> int:
        """How many requests own a page."""
        return self._owners[page]

    def add(self, name: Hashable) -> None:
        """Begins a request without tokens.

        Raises:
            RequestExists: There is one of this name.
        """
        self._refuse_known(name)
        self._requests[name] = _Request([], 0)

    def fork(self, source: Hashable, name: Hashable, *, tokens: int | None = None) -> None:
        """Begins a request with the first tokens of another; takes no page.

        Args:
            source: The request to share with.
            name: Of the new one.
            tokens: How many tokens; None: all.

        Raises:
            UnknownRequest: There is no ``source``.
            RequestExists: There is a ``name``.
            ValueError: ``source`` has fewer tokens.
        """
        other = self._find(source)
        self._refuse_known(name)
        length = other.length if tokens is None else operator.index(tokens)
        if not 0 <= length <= other.length:
            raise ValueError(f"tokens: got {length}, expected 0 to {other.length}")
        pages = other.pages[: _pages(length)]
        for page in pages:
            self._owners[page] += 1
        self._requests[name] = _Request(pages, length)

    def append(
        self, tokens: Mapping[Hashable, int], *, batch: int | None = None, width: int | None = None
    ) -> Writes:
        """Makes room for new tokens at the end of some requests, of all or of none.

        The caller applies ``copies`` before it writes ``slots``, and both before anything that a
        later call returns.

        Args:
            tokens: Request to count of new tokens; row i of the result is its i-th request.
            batch: Rows of the result; None: as many as requests.
            width: Columns of ``slots``; None: the largest count.

        Raises:
            OutOfPages: Too few pages are free.
            TableTooNarrow: A request would need more than ``max_pages_per_seq`` pages.
            UnknownRequest: A name is unknown.
            ValueError: A count is negative, or ``batch`` or ``width`` too small.
        """
        rows, columns = len(tokens), max(tokens.values(), default=0)
        batch = _at_least("batch", batch, rows)
        width = _at_least("width", width, columns)
        growths = self._plan(tokens)
        needed = sum(growth.taken for growth in growths)
        if needed > len(self._free):
            raise OutOfPages(needed, len(self._free))

        writes = Writes(np.full((batch, width), -1, np.int32), np.full((batch, 2), -1, np.int32))
        copies = []
        for row, growth in enumerate(growths):
            if growth.copied:
                copies.append(self._replace_last(growth.request))
            writes.slots[row, : growth.count] = self._grow(growth)
        writes.copies[: len(copies)] = np.array(copies, np.int32).reshape(-1, 2)
        return writes

    def rewind(self, name: Hashable, tokens: int) -> None:
        """Drops a request's last tokens, such as rejected drafts.

        Raises:
            UnknownRequest: There is none of this name.
            ValueError: It has fewer tokens, or ``tokens`` is negative.
        """
        request, tokens = self._find(name), operator.index(tokens)
        if not 0 <= tokens <= request.length:
            raise ValueError(f"tokens: got {tokens}, expected 0 to {request.length}")
        request.length -= tokens
        self._drop(request, _pages(request.length))

    def release(self, name: Hashable) -> None:
        """Ends a request; pages that nobody else owns become free.

        Raises:
            UnknownRequest: There is none of this name.
        """
        self._drop(self._find(name), 0)
        del self._requests[name]

    def rows(self, names: Sequence[Hashable], *, batch: int | None = None) -> Rows:
        """Block table and lengths of some requests.

        Args:
            names: Row i is the i-th of these.
            batch: Rows; None: as many as names.

        Raises:
            UnknownRequest: A name is unknown.
            ValueError: ``batch`` is too small.
        """
        batch = _at_least("batch", batch, len(names))
        table = np.full((batch, self._max_pages_per_seq), -1, np.int32)
        lengths = np.zeros(batch, np.int32)
        for row, name in enumerate(names):
            request = self._find(name)
            table[row, : len(request.pages)] = request.pages
            lengths[row] = request.length
        return Rows(table, lengths)

    def _plan(self, tokens: Mapping[Hashable, int]) -> list[_Growth]:
        """What each request will take, found without changing anything."""
        left: Counter[int] = Counter()  # requests of this call that move away from a shared page
        growths = []
        requests = [self._find(name) for name in tokens]
        for request, (name, given) in zip(requests, tokens.items(), strict=True):
            count = operator.index(given)
            if count < 0:
                raise ValueError(f"tokens: got {count} for request {name!r}, expected at least 0")
            width = _pages(request.length + count)
            if width > self._max_pages_per_seq:
                raise TableTooNarrow(
                    f"request {name!r}: {request.length} + {count} tokens need {width} pages,"
                    f" max_pages_per_seq is {self._max_pages_per_seq}"
                )
            copied = False
            if count and request.length % PAGE_SIZE:
                last = request.pages[-1]
                copied = self._owners[last] - left[last] > 1
                left[last] += copied
            growths.append(_Growth(request, count, copied, width - len(request.pages)))
        return growths

    def _replace_last(self, request: _Request) -> tuple[int, int]:
        """Moves a request's last page to a fresh one; returns both."""
        source, destination = request.pages[-1], self._take()
        self._owners[source] -= 1
        request.pages[-1] = destination
        return source, destination

    def _grow(self, growth: _Growth) -> np.ndarray:
        """Adds pages and tokens; returns the tokens' slots, int32 [count]."""
        request = growth.request
        request.pages += [self._take() for _ in range(growth.fresh)]
        first = request.length // PAGE_SIZE
        positions = np.arange(request.length, request.length + growth.count)
        pages = np.array(request.pages[first:], np.int32)
        request.length += growth.count
        return pages[positions // PAGE_SIZE - first] * PAGE_SIZE + positions % PAGE_SIZE

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _drop(self, request: _Request, kept: int) -> None:
        """Gives up all pages of a request but the first ``kept``."""
        for page in reversed(request.pages[kept:]):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
        del request.pages[kept:]

    def _find(self, name: Hashable) -> _Request:
        if name not in self._requests:
            raise UnknownRequest(f"no request {name!r}")
        return self._requests[name]

    def _refuse_known(self, name: Hashable) -> None:
        if name in self._requests:
            raise RequestExists(f"request {name!r} exists")


def _pages(length: int) -> int:
    return -(-length // PAGE_SIZE)


def _at_least(name: str, given: int | None, least: int) -> int:
    if given is not None and given < least:
        raise ValueError(f"{name}: got {given}, expected at least {least}")
    return least if given is None else given
