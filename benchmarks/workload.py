"""The rows of the benchmark: shapes, lengths, peers' times, and inputs that keep L2 cold."""

import dataclasses
import fnmatch
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import get_mla_metadata
from jax_flashmla._roofline import HEAD_DIM_QK, HEAD_DIM_V, Work

PAGE_SIZE = 64
ROTATED_BYTES = 4.3e9  # KV bytes of all sets of a row together: nothing stays in L2
MAX_SETS = 128
ODD_HEADS = (4, 8, 20, 32, 40, 48, 96)
HEAD_SHAPES = ((128, 4096), (16, 4096))
# Feeding ``out`` back as ``q_latent`` is a linear map: keys are values, so out is the mean of many
# random values plus SOFTMAX_SCALE * q_latent. Below 1 that dies away, here to a few hundredths. The
# logits then come from q_rope, sized to give them the peers' standard deviation of 1.
SOFTMAX_SCALE = 0.3
Q_LATENT_STD = 0.02
Q_ROPE_STD = 1.0 / (SOFTMAX_SCALE * math.sqrt(HEAD_DIM_QK - HEAD_DIM_V))
PEERS = pathlib.Path(__file__).parent / "peers-h200.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: shape, and what the peers needed.

    Attributes:
        h_q: Query heads (h_kv is 1).
        s_q: Query tokens per request; above 1 the mask is causal.
        batch: Requests.
        seqlen: Tokens of each request, or "varM": lengths normal(M, M/2).
        best_us: Best peer's time, None where it does not apply.
        best_peer: Its name.
    """

    h_q: int
    s_q: int
    batch: int
    seqlen: int | str
    best_us: float | None = None
    best_peer: str | None = None

    @property
    def name(self) -> str:
        """Such as 128x4096/h16/s1."""
        return f"{self.batch}x{self.seqlen}/h{self.h_q}/s{self.s_q}"

    @property
    def lengths(self) -> np.ndarray:
        """int32 [batch]. Varying lengths are the normal's quantiles, shuffled: no lucky draw."""
        if isinstance(self.seqlen, int):
            return np.full(self.batch, self.seqlen, np.int32)
        mean = int(self.seqlen.removeprefix("var"))
        normal = statistics.NormalDist(mean, mean / 2)
        quantiles = [normal.inv_cdf((i + 0.5) / self.batch) for i in range(self.batch)]
        lengths = np.maximum(np.rint(quantiles).astype(np.int32), self.s_q)
        return np.random.default_rng(0).permutation(lengths)

    @property
    def pages(self) -> np.ndarray:
        """Pages of each request, int32 [batch]."""
        return -(-self.lengths // PAGE_SIZE)

    @property
    def work(self) -> Work:
        """Bytes and FLOP of one call; no page is shared."""
        tokens = int(self.lengths.sum(dtype=np.int64))
        return Work(tokens, tokens, self.batch, self.s_q, self.h_q)

    @property
    def sets(self) -> int:
        """KV sets to rotate over."""
        return max(1, min(MAX_SETS, round(ROTATED_BYTES / self.work.kv_bytes)))

    def matches(self, patterns: str) -> bool:
        """Whether the name matches one of the comma-separated patterns."""
        return matches(self.name, patterns)

    def shrunk(self) -> "Row":
        """The same row small enough for a CPU; no peer has a time for it."""
        seqlen = min(self.seqlen, 130) if isinstance(self.seqlen, int) else "var96"
        return Row(min(self.h_q, 4), self.s_q, min(self.batch, 3), seqlen)


def matches(name: str, patterns: str) -> bool:
    """Whether a name matches one of the comma-separated patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split(","))


def load_rows(patterns: str = "*") -> list[Row]:
    """The 62 rows of the peers' table whose names match one of the comma-separated patterns."""
    rows = []
    for entry in json.loads(PEERS.read_text(encoding="utf-8"))["rows"]:
        best = entry["best_us"]
        peer = next(name for name, us in entry["peers_us"].items() if us == best)
        row = Row(entry["h_q"], entry["s_q"], entry["batch"], entry["seqlen"], best, peer)
        if row.matches(patterns):
            rows.append(row)
    return rows


def load_head_rows(patterns: str = "*") -> list[Row]:
    """Other head counts than the table's, and the table's own on the same shapes beside them."""
    rows = []
    for batch, seqlen in HEAD_SHAPES:
        rows += [Row(h_q, s_q, batch, seqlen) for h_q in ODD_HEADS for s_q in (1, 2, 4)]
        rows += load_rows(f"{batch}x{seqlen}/*")
    return [row for row in rows if row.matches(patterns)]


def most_pages(rows: Iterable[Row]) -> int:
    """Pages of the KV sets of the row that has most."""
    return max(row.sets * int(row.pages.sum()) for row in rows)


def make_pool(rows: Sequence[Row]) -> jax.Array:
    """A pool of random pages, [num_pages, page_size, 1, head_dim_qk], that all rows take from."""
    shape = (most_pages(rows), PAGE_SIZE, 1, HEAD_DIM_QK)
    return jax.jit(lambda: jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16))()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a chain of calls, each on its own pages of the pool."""

    q_latent: jax.Array  # [b, s_q, h_q, 512]
    q_rope: jax.Array  # [b, s_q, h_q, 64]
    tables: tuple[jax.Array, ...]  # KV sets of int32 [b, max_pages_per_seq]
    cache_seqlens: jax.Array  # int32 [b]
    schedule: tuple[jax.Array, jax.Array]


def make_inputs(row: Row, num_pages: int) -> Inputs:
    """Random queries and disjoint shuffled block tables into a pool of ``num_pages``."""
    rng = np.random.default_rng(1)
    tables = tuple(map(jnp.asarray, deal_tables(rng, num_pages, row.pages, row.sets)))
    lengths = jnp.asarray(row.lengths)
    schedule = get_mla_metadata(lengths, row.s_q * row.h_q, 1)
    latent, rope = (jnp.asarray(draw(rng, row)) for draw in (random_latent, random_rope))
    return Inputs(latent, rope, tables, lengths, schedule)


def deal_tables(
    rng: np.random.Generator, num_pages: int, pages: np.ndarray, sets: int
) -> Iterator[np.ndarray]:
    """Disjoint shuffled block tables int32 [b, width] with so many pages for each request."""
    order, total = rng.permutation(num_pages).astype(np.int32), int(pages.sum())
    valid = np.arange(pages.max()) < pages[:, None]
    for i in range(sets):
        table = np.full(valid.shape, -1, np.int32)
        table[valid] = order[i * total : (i + 1) * total]
        yield table


def random_latent(rng: np.random.Generator, row: Row) -> np.ndarray:
    """Random `q_latent` of a row's first call."""
    return _random_query(rng, row, HEAD_DIM_V, Q_LATENT_STD)


def random_rope(rng: np.random.Generator, row: Row) -> np.ndarray:
    """Random `q_rope` of all calls of a row."""
    return _random_query(rng, row, HEAD_DIM_QK - HEAD_DIM_V, Q_ROPE_STD)


def _random_query(rng: np.random.Generator, row: Row, width: int, std: float) -> np.ndarray:
    values = rng.standard_normal((row.batch, row.s_q, row.h_q, width), np.float32)
    return (values * std).astype(jnp.bfloat16)
