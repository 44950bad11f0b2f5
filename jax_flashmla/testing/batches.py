"""The host half of a case's data: request lengths, block tables, which cache slots are read."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jax_flashmla.testing.cases import PAGE_SIZE, Case, Shape

# What a table may hold beyond a request's length, besides the page after the last and real pages,
# which are full of NaN or another request's: nothing of it may reach a result.
GARBAGE_ENTRIES = (-1, 2147480000, -2147483648)
EDGE_LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 1024, 4096, 8192, 32768, 131072)

Lengths = np.ndarray  # int32 [batch]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Lengths and tables of one batch.

    Attributes:
        cache_seqlens: int32 [batch].
        block_table: int32 [batch, pages]; garbage beyond each request's last page.
        position: int32 [pool_pages, page_size]; a token position that uses the slot, −1 where no
            request reads it.
    """

    cache_seqlens: np.ndarray
    block_table: np.ndarray
    position: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """Bool [pool_pages, page_size]: the slots that some request attends to."""
        return self.position >= 0


def _edges(shape: Shape, rng: np.random.Generator) -> Lengths:
    known = [n for n in EDGE_LENGTHS if n <= shape.capacity]
    start = rng.integers(len(known) + 2)
    return np.resize(np.roll([*known, shape.capacity, shape.capacity - 1], -start), shape.batch)


def _one_long(shape: Shape, rng: np.random.Generator) -> Lengths:
    lengths = rng.integers(0, min(2 * PAGE_SIZE, shape.capacity) + 1, shape.batch)
    lengths[rng.integers(shape.batch)] = shape.capacity
    return lengths


def _skewed(shape: Shape, rng: np.random.Generator) -> Lengths:
    return np.minimum(rng.lognormal(np.log(shape.capacity / 4), 1.5, shape.batch), shape.capacity)


def _around_pages(shape: Shape, rng: np.random.Generator) -> Lengths:
    pages = rng.integers(0, shape.pages + 1, shape.batch)
    return np.clip(pages * PAGE_SIZE + rng.integers(-1, 2, shape.batch), 0, shape.capacity)


LENGTH_PATTERNS: dict[str, Callable[[Shape, np.random.Generator], Lengths]] = {
    "edges": _edges,
    "ragged": lambda s, rng: rng.integers(0, s.capacity + 1, s.batch),
    "full": lambda s, _: np.full(s.batch, s.capacity),
    "skewed": _skewed,
    "one_long": _one_long,
    "every_other": lambda s, rng: np.where(
        np.arange(s.batch) % 2 == rng.integers(2), s.capacity, 0
    ),
    "around_pages": _around_pages,
    "whole_pages": lambda s, rng: PAGE_SIZE * rng.integers(0, s.pages + 1, s.batch),
    "shorter_than_s_q": lambda s, rng: rng.integers(0, min(s.s_q, s.capacity) + 1, s.batch),
    "ones": lambda s, _: np.ones(s.batch),
    "zeros": lambda s, _: np.zeros(s.batch),
}


def _shared_prefix(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    pages = _shuffled(shape, rng)
    pages[:, : shape.pages // 2] = pages[:1, : shape.pages // 2]
    return pages


def _shuffled(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    need = shape.batch * shape.pages
    rounds = -(-need // shape.pool_pages)
    pages = np.concatenate([rng.permutation(shape.pool_pages) for _ in range(rounds)])
    return pages[:need].reshape(shape.batch, shape.pages)


def _in_order(shape: Shape, _: np.random.Generator) -> np.ndarray:
    return (np.arange(shape.batch * shape.pages) % shape.pool_pages).reshape(shape.batch, -1)


TABLE_PATTERNS: dict[str, Callable[[Shape, np.random.Generator], np.ndarray]] = {
    "shuffled": _shuffled,
    "in_order": _in_order,
    "shared_prefix": _shared_prefix,
    "one_page": lambda s, rng: np.full((s.batch, s.pages), rng.integers(s.pool_pages)),
}


def make_batch(case: Case) -> Batch:
    """Lengths and tables of a case; the same case always gives the same batch."""
    rng = np.random.default_rng(case.seed)
    lengths = LENGTH_PATTERNS[case.lengths](case.shape, rng).astype(np.int32)
    return lay_out(lengths, TABLE_PATTERNS[case.table](case.shape, rng), case.shape, rng)


def lay_out(lengths: Lengths, pages: np.ndarray, shape: Shape, rng: np.random.Generator) -> Batch:
    """The batch of these lengths over these pages, garbage behind each request's last page.

    Args:
        lengths: int32 [batch].
        pages: int [batch, pages]; the page of every table entry, used or not.
        shape: the shape that both belong to.
        rng: draws the garbage.
    """
    token = np.arange(shape.capacity, dtype=np.int32)
    attended = token < lengths[:, None]  # [batch, capacity]
    position = np.full((shape.pool_pages, PAGE_SIZE), -1, np.int32)
    slots = pages[:, token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
    position.reshape(-1)[slots[attended]] = np.broadcast_to(token, slots.shape)[attended]
    real = rng.integers(shape.pool_pages, size=2)
    garbage = rng.choice([*GARBAGE_ENTRIES, shape.pool_pages, *real], pages.shape)
    used = attended[:, ::PAGE_SIZE]
    table = np.where(used, pages, garbage).astype(np.int32)
    return Batch(lengths, table, position)
