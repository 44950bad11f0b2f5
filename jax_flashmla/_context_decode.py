"""What one device of a context-parallel decode does: attention to the pages that it holds.

A causal mask cuts the last s_q - 1 keys off in steps. They may lie on several devices, while the
kernel's mask is aligned to the end of what it reads. So the keys are divided in two:

1. whole pages that every query sees, page p with `64 (p + 1) <= length - (s_q - 1)`: one decode of
   all queries together, without a mask;
2. the pages behind them, one or two for up to 66 queries: each query is a request of its own, with
   its own length.

A length without a mask, or with one query, needs only one decode.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla._api import get_mla_metadata, mla_decode
from jax_flashmla._page_shares import share
from jax_flashmla._shapes import PAGE_SIZE
from jax_flashmla.schedule import Schedule

MOST_PIECES = 2
Piece = tuple[jax.Array, jax.Array]  # block_table int32 [requests, width], cache_seqlens [requests]


def pieces(
    block_table: jax.Array, cache_seqlens: jax.Array, s_q: int, *, axis_name: str, causal: bool
) -> list[Piece]:
    """The decodes of this device: of b requests, and of b * s_q where there is a second.

    Args:
        block_table: int32 `[b, width]`, this device's.
        cache_seqlens: int32 `[b]`, on all devices together.
        s_q: queries of each request.
        axis_name: the mesh axis.
        causal: whether a query is hidden from the keys after it.
    """
    n, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    longest = min(n * block_table.shape[1] * PAGE_SIZE, np.iinfo(np.int32).max)
    lengths = jnp.clip(cache_seqlens, 0, longest)
    if not causal or s_q == 1:
        return [(block_table, share(lengths, device, n))]
    seen = jnp.maximum(lengths - (s_q - 1), 0) // PAGE_SIZE * PAGE_SIZE
    held = share(seen, device, n)  # [b], of the keys that all queries see

    # The rest: at most s_q + 62 keys, from a page of this device's table on.
    pages = -(-(s_q + PAGE_SIZE - 2) // PAGE_SIZE)
    columns = (held // PAGE_SIZE)[:, None] + jnp.arange(-(-pages // n), dtype=jnp.int32)[None]
    table = jnp.take_along_axis(block_table, columns, axis=1, mode="fill", fill_value=-1)
    after = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)
    visible = jnp.maximum(lengths[:, None] - after[None], 0)  # [b, s_q]
    rest = share(visible, device, n) - held[:, None]
    return [(block_table, held), (jnp.repeat(table, s_q, axis=0), rest.reshape(-1))]


def schedules(
    found: Sequence[Piece], s_q: int, h_q: int, h_kv: int, num_sm_parts: int | None
) -> tuple[Schedule, ...]:
    """A schedule for each piece."""
    rows = (s_q * h_q // h_kv, h_q // h_kv)[: len(found)]
    return tuple(
        get_mla_metadata(lengths, count, h_kv, num_sm_parts=num_sm_parts)
        for (_, lengths), count in zip(found, rows, strict=True)
    )


def partials(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    found: Sequence[Piece],
    given: Sequence[Schedule | None],
    options: dict,
) -> tuple[jax.Array, jax.Array]:
    """Attends to each piece: outs `[pieces, b, s_q, h_q, 512]` and lses `[pieces, b, s_q, h_q]`."""
    b, s_q, *_ = q_latent.shape
    each_alone = tuple(x.reshape(b * s_q, 1, *x.shape[2:]) for x in (q_latent, q_rope))
    queries = ((q_latent, q_rope), each_alone)[: len(found)]
    outs, lses = [], []
    for query, piece, schedule in zip(queries, found, given, strict=True):
        out, lse = mla_decode(*query, kv_cache, *piece, causal=False, schedule=schedule, **options)
        outs.append(out.reshape(q_latent.shape))
        lses.append(lse.reshape(q_latent.shape[:3]))
    return jnp.stack(outs), jnp.stack(lses)
