"""The schedule: how the pages of a batch are divided among the parts of the GPU, in pure JAX.

This file is the definition and the portable lowering of `jax_flashmla.get_mla_metadata`. The
device kernel and the host C++ in `cuda/schedule/` compute the same integers.

The requests are laid end to end on one line of cost, `REQUEST_COST` for each request and one for
each of its pages, and the line is cut into equal shares, a little larger than need be if that makes
fewer pieces. A cut inside a request's own cost is a cut before its first page.

Or requests stand apart: each gets as many parts of its own as it has shares of pages. No part then
has the end of one and the beginning of another, which is better where there are parts enough.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import _dispatch
from jax_flashmla._shapes import PAGE_SIZE, TileSchedulerMetaDataSize

REQUEST_COST = 3  # in pages: what starting a request costs a part beside its pages
PIECE_COST = 4  # in pages: what a piece, whole or split, costs its part when shares are compared
MERGE_COST = 3  # in pages: what a step pays for merging splits
SMOOTH_SPLITS = 16  # more are merged in one pass only where they are a power of two
SHARE_CANDIDATES = 9  # shares compared: the least possible and the next ones
MAX_CANDIDATE_BATCH = 1024  # beyond it: the least share, on one line
ROW_TILE = 64  # packed query rows that one CTA works on
INT32_MAX = 2**31 - 1


class Schedule(NamedTuple):
    """The two arrays of `get_mla_metadata`.

    Attributes:
        tile_scheduler_metadata: int32 `[num_sm_parts, TileSchedulerMetaDataSize]`.
        num_splits: int32 `[b + 1]`.
    """

    tile_scheduler_metadata: jax.Array
    num_splits: jax.Array


def default_num_sm_parts(num_heads_per_head_k: int, num_heads_k: int) -> int:
    """Returns how many parts fill the local GPU (an H200 where none is visible).

    Every row tile of every KV head is a CTA of its own, and all walk the same parts.

    Args:
        num_heads_per_head_k: packed query rows per request and KV head, s_q * h_q // h_kv.
        num_heads_k: KV heads.
    """
    row_tiles = -(-num_heads_per_head_k // ROW_TILE)
    return max(1, _dispatch.num_sms() // (num_heads_k * row_tiles))


def plan(cache_seqlens: jax.Array, num_sm_parts: int) -> Schedule:
    """Divides the pages of a batch among parts.

    Args:
        cache_seqlens: int32 `[b]`, tokens per request; negative lengths count as 0.
        num_sm_parts: number of parts, at least 1.

    Returns:
        The `Schedule`. Row p of the metadata is `[begin_idx, begin_page, end_idx, end_page,
        begin_split, 0, 0, 0]`: part p works from page `begin_page` of request `begin_idx` up to,
        not including, page `end_page` of request `end_idx`, and its first piece is split number
        `begin_split` of its request. Request r has `num_splits[r + 1] - num_splits[r]` splits.
    """
    (batch,) = cache_seqlens.shape
    ends = jnp.cumsum(_costs(cache_seqlens), dtype=jnp.int32)  # [b], the line of cost
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])  # [b + 1], starts[b] = total
    starts, cutting = _cutting(starts, num_sm_parts)
    first_shares = (starts[:-1] + cutting.request_cost) // cutting.share  # [b], of first pages
    idx, page = _boundaries(starts, cutting, num_sm_parts)
    parts = jnp.arange(num_sm_parts, dtype=jnp.int32)
    begun = jnp.minimum(idx[:-1], batch - 1)  # idle parts begin past the last request
    begin_split = jnp.where(page[:-1] > 0, parts - first_shares[begun], 0)
    unused = jnp.zeros((num_sm_parts, TileSchedulerMetaDataSize - 5), jnp.int32)
    columns = jnp.stack([idx[:-1], page[:-1], idx[1:], page[1:], begin_split], axis=1)
    splits = jnp.cumsum(_splits(starts, cutting), dtype=jnp.int32)
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), splits])
    return Schedule(jnp.concatenate([columns, unused], axis=1), num_splits)


def _costs(cache_seqlens: jax.Array) -> jax.Array:
    """Returns the cost of each request, capped so that no sum over the batch leaves int32."""
    (batch,) = cache_seqlens.shape
    page_cap = (INT32_MAX - SHARE_CANDIDATES) // batch - REQUEST_COST
    pages = _ceil_div(jnp.maximum(cache_seqlens, 0), PAGE_SIZE)
    return REQUEST_COST + jnp.minimum(pages, page_cap)


class _Cutting(NamedTuple):
    """How a line is cut: part p begins at p * share."""

    share: jax.Array
    request_cost: jax.Array | int  # before a request's first page
    unit_pages: jax.Array | int  # pages per unit of cost


def _cutting(starts: jax.Array, num_sm_parts: int) -> tuple[jax.Array, _Cutting]:
    """Returns the line to cut and how: shares as small as possible, or larger for fewer pieces."""
    batch = starts.shape[0] - 1
    least = _ceil_div(starts[-1], num_sm_parts)
    if batch > MAX_CANDIDATE_BATCH:
        return starts, _Cutting(least, REQUEST_COST, 1)
    more = jnp.arange(SHARE_CANDIDATES, dtype=jnp.int32)
    shares = least + more
    pages = jnp.maximum(least - REQUEST_COST, 1) + more  # of a part, where requests stand apart

    def cost(shares: jax.Array, splits: jax.Array, pieces: jax.Array) -> jax.Array:
        merge = jnp.where(pieces > batch, MERGE_COST, 0)
        twice = jnp.where(_merges_twice(splits).any(axis=0), num_sm_parts // 2, 0)
        return (shares - least + merge) * num_sm_parts + twice + PIECE_COST * pieces

    in_row = _splits(starts[:, None], _Cutting(shares[None], REQUEST_COST, 1))
    alone = _parts_apart(starts[:, None], pages[None])
    pieces_in_row, pieces_alone = (x.sum(axis=0, dtype=jnp.int32) for x in (in_row, alone))
    cost_alone = cost(pages, alone, pieces_alone)
    cost_apart = jnp.where(pieces_alone <= num_sm_parts, cost_alone, INT32_MAX)
    costs = jnp.stack([cost_apart, cost(shares, in_row, pieces_in_row)], axis=1)
    choice = jnp.argmin(costs).astype(jnp.int32)
    share, apart_pages, apart = shares[choice // 2], pages[choice // 2], choice % 2 == 0
    parts = jnp.cumsum(_parts_apart(starts, apart_pages), dtype=jnp.int32)
    line_apart = jnp.concatenate([jnp.zeros(1, jnp.int32), parts])
    cutting = _Cutting(
        jnp.where(apart, 1, share),
        jnp.where(apart, 0, REQUEST_COST),
        jnp.where(apart, apart_pages, 1),
    )
    return jnp.where(apart, line_apart, starts), cutting


def _merges_twice(splits: jax.Array) -> jax.Array:
    """Returns whether the merge takes two passes for so many splits."""
    return (splits > SMOOTH_SPLITS) & (splits & (splits - 1) != 0)


def _parts_apart(starts: jax.Array, share: jax.Array) -> jax.Array:
    """Returns how many parts of its own each request takes, at least one."""
    pages = starts[1:] - starts[:-1] - REQUEST_COST
    return 1 + jnp.maximum(pages - 1, 0) // share


def _splits(starts: jax.Array, cutting: _Cutting) -> jax.Array:
    """Returns how many splits each request has: one more than the cuts behind its first page."""
    first_pages = starts[:-1] + cutting.request_cost
    return 1 + jnp.maximum(0, (starts[1:] - 1) // cutting.share - first_pages // cutting.share)


def _boundaries(
    starts: jax.Array, cutting: _Cutting, num_sm_parts: int
) -> tuple[jax.Array, jax.Array]:
    """Returns request and page at each of the `num_sm_parts + 1` cuts, (b, 0) past the end."""
    batch, total = starts.shape[0] - 1, starts[-1]
    parts = jnp.arange(num_sm_parts + 1, dtype=jnp.int32)
    last = (total - 1) // cutting.share  # the last cut before the end; no later one is multiplied
    cut = jnp.minimum(parts, last) * cutting.share
    before = starts[None, 1:] <= cut[:, None]  # [num_sm_parts + 1, b], whole requests before a cut
    idx = before.sum(axis=1, dtype=jnp.int32)
    page = jnp.maximum(0, cut - starts[idx] - cutting.request_cost) * cutting.unit_pages
    inside = parts <= last
    return jnp.where(inside, idx, batch), jnp.where(inside, page, 0)


def _ceil_div(numerator: jax.Array, denominator: int) -> jax.Array:
    """Divides rounding up, without the addition that would overflow."""
    return numerator // denominator + (numerator % denominator != 0).astype(jnp.int32)
