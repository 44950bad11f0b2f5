"""Exchange of partial results over a mesh axis, and their merge."""

from typing import Literal

import jax

from jax_flashmla._dispatch import Implementation
from jax_flashmla._merge import merge_partials

Exchange = Literal["gather", "heads"]
EXCHANGES = ("gather", "heads")


def check(exchange: str, h_q: int, n: int) -> None:
    """Refuses an exchange that is unknown, or heads that n devices cannot share.

    Raises:
        ValueError: it is one of them.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: got {exchange!r}, expected one of {list(EXCHANGES)}")
    if exchange == "heads" and h_q % n:
        raise ValueError(
            f"exchange: got 'heads' with {h_q} query heads, expected a multiple of the {n} devices"
        )


def merge_over(
    outs: jax.Array,
    lses: jax.Array,
    *,
    axis_name: str,
    exchange: Exchange,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Merges the partial results of all devices of an axis, inside `jax.shard_map`.

    Args:
        outs: `[k, b, s_q, h_q, 512]`, the k partials of this device.
        lses: float32 `[k, b, s_q, h_q]`.
        axis_name: the mesh axis.
        exchange: as in `context_parallel.mla_decode_context_parallel`.
        implementation: of the merge.

    Returns:
        out `[b, s_q, h_q, 512]` and lse `[b, s_q, h_q]`, the same bits on all devices.
    """
    if exchange == "heads":
        outs, lses = (_deal_heads(x, axis_name) for x in (outs, lses))
        merged = merge_partials(outs, lses, implementation=implementation)
        out, lse = (_gather(x, axis_name, 2) for x in merged)
        return out, lse
    gathered = (_gather(x, axis_name, 0) for x in (outs, lses))
    return merge_partials(*gathered, implementation=implementation)


def _deal_heads(partials: jax.Array, axis_name: str) -> jax.Array:
    """Gives away `[k, b, s_q, h_q, ...]` for `[n * k, b, s_q, h_q / n, ...]` of all devices."""
    return jax.lax.all_to_all(partials, axis_name, split_axis=3, concat_axis=0, tiled=True)


def _gather(x: jax.Array, axis_name: str, dimension: int) -> jax.Array:
    """Gathers shards along a dimension; shard_map's check learns that all devices have the same."""
    to = "invarying" if jax.typeof(x).manual_axis_type.varying else "varying"
    return jax.lax.all_gather(x, axis_name, axis=dimension, tiled=True, to=to)
