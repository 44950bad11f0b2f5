"""The schedule: how the pages of a batch are divided among the parts of the GPU, in pure JAX.

This file is the definition and the portable lowering of `jax_flashmla.get_mla_metadata`. The
device kernel and the host C++ in `cuda/schedule/` compute the same integers.

The requests are laid end to end on one line of cost, `REQUEST_COST` for each request and one for
each of its pages, and the line is cut into equal shares, a little larger than need be if that makes
fewer pieces. A cut inside a request's own cost is a cut before its first page.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import _dispatch
from jax_flashmla._shapes import PAGE_SIZE, TileSchedulerMetaDataSize

REQUEST_COST = 2  # in pages: what starting a request costs a part beside its pages
MIN_SHARE = 2  # in pages: no part gets less, so that few pages are not split into crumbs
PIECE_COST = 3  # in pages: what a piece, whole or split, costs its part when shares are compared
MERGE_COST = 6  # in pages: what a step pays for merging splits
SHARE_CANDIDATES = 9  # shares compared: the least possible and the next ones
MAX_CANDIDATE_BATCH = 1024  # beyond it the least share is taken
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
    share = _share(starts, num_sm_parts)
    first_shares = (starts[:-1] + REQUEST_COST) // share  # [b], the share of each first page
    idx, page = _boundaries(starts, share, num_sm_parts)
    parts = jnp.arange(num_sm_parts, dtype=jnp.int32)
    begun = jnp.minimum(idx[:-1], batch - 1)  # idle parts begin past the last request
    begin_split = jnp.where(page[:-1] > 0, parts - first_shares[begun], 0)
    unused = jnp.zeros((num_sm_parts, TileSchedulerMetaDataSize - 5), jnp.int32)
    columns = jnp.stack([idx[:-1], page[:-1], idx[1:], page[1:], begin_split], axis=1)
    splits = jnp.cumsum(_splits(starts, share), dtype=jnp.int32)
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), splits])
    return Schedule(jnp.concatenate([columns, unused], axis=1), num_splits)


def _costs(cache_seqlens: jax.Array) -> jax.Array:
    """Returns the cost of each request, capped so that no sum over the batch leaves int32."""
    (batch,) = cache_seqlens.shape
    page_cap = (INT32_MAX - SHARE_CANDIDATES) // batch - REQUEST_COST
    pages = _ceil_div(jnp.maximum(cache_seqlens, 0), PAGE_SIZE)
    return REQUEST_COST + jnp.minimum(pages, page_cap)


def _share(starts: jax.Array, num_sm_parts: int) -> jax.Array:
    """Returns the cost of each part: the least possible, or a little more for fewer pieces."""
    batch = starts.shape[0] - 1
    least = jnp.maximum(_ceil_div(starts[-1], num_sm_parts), MIN_SHARE)
    if batch > MAX_CANDIDATE_BATCH:
        return least
    more = jnp.arange(SHARE_CANDIDATES, dtype=jnp.int32)
    pieces = _splits(starts[:, None], (least + more)[None]).sum(axis=0, dtype=jnp.int32)
    merge = jnp.where(pieces > batch, MERGE_COST, 0)
    return least + jnp.argmin((more + merge) * num_sm_parts + PIECE_COST * pieces).astype(jnp.int32)


def _splits(starts: jax.Array, share: jax.Array) -> jax.Array:
    """Returns how many splits each request has: one more than the cuts behind its first page."""
    return 1 + jnp.maximum(0, (starts[1:] - 1) // share - (starts[:-1] + REQUEST_COST) // share)


def _boundaries(
    starts: jax.Array, share: jax.Array, num_sm_parts: int
) -> tuple[jax.Array, jax.Array]:
    """Returns request and page at each of the `num_sm_parts + 1` cuts, (b, 0) past the end."""
    batch, total = starts.shape[0] - 1, starts[-1]
    parts = jnp.arange(num_sm_parts + 1, dtype=jnp.int32)
    last = (total - 1) // share  # the last cut before the end; no later one is multiplied out
    cut = jnp.minimum(parts, last) * share
    before = starts[None, 1:] <= cut[:, None]  # [num_sm_parts + 1, b], whole requests before a cut
    idx = before.sum(axis=1, dtype=jnp.int32)
    page = jnp.maximum(0, cut - starts[idx] - REQUEST_COST)
    inside = parts <= last
    return jnp.where(inside, idx, batch), jnp.where(inside, page, 0)


def _ceil_div(numerator: jax.Array, denominator: int) -> jax.Array:
    """Divides rounding up, without the addition that would overflow."""
    return numerator // denominator + (numerator % denominator != 0).astype(jnp.int32)
