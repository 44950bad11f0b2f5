"""Exchange of partial results over a mesh axis, and their merge."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _direct_exchange, _manual_axes
from jax_flashmla._direct_exchange import Mailboxes
from jax_flashmla._dispatch import Implementation
from jax_flashmla._merge import merge_partials

Exchange = Literal["direct", "gather", "heads"]
EXCHANGES = ("direct", "gather", "heads")


def check(exchange: str, h_q: int, n: int, *, own_heads: bool = False) -> None:
    """Refuses an exchange that is unknown, or that n devices cannot do.

    Raises:
        ValueError: it is one of them.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: got {exchange!r}, expected one of {list(EXCHANGES)}")
    if exchange == "direct" and n > _direct_exchange.MAX_DEVICES:
        raise ValueError(
            f"exchange: got 'direct' over {n} devices, expected at most"
            f" {_direct_exchange.MAX_DEVICES}, of one host"
        )
    if exchange == "heads" and h_q % n:
        raise ValueError(
            f"exchange: got 'heads' with {h_q} query heads, expected a multiple of the {n} devices"
        )
    if own_heads and h_q % n:
        raise ValueError(
            f"own_heads: got True with {h_q} query heads, expected a multiple of the {n} devices"
        )


def merge_over(
    outs: jax.Array,
    lses: jax.Array,
    *,
    axis_name: str,
    exchange: Exchange,
    implementation: Implementation,
    own_heads: bool = False,
    mailboxes: Mailboxes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges the partial results of all devices of an axis, inside `jax.shard_map`.

    Args:
        outs: `[k, b, s_q, h_q, 512]`, the k partials of this device.
        lses: float32 `[k, b, s_q, h_q]`.
        axis_name: the mesh axis.
        exchange: as in `context_parallel.mla_decode_context_parallel`.
        implementation: of the merge.
        own_heads: whether each device gets its share of the heads alone.
        mailboxes: of a direct exchange, None to open them here.

    Returns:
        out `[b, s_q, h_q, 512]` and lse `[b, s_q, h_q]`, the same bits on all devices; with
        own_heads of h_q / n heads.
    """
    if exchange == "direct":
        merged = _direct_exchange.merge_over(
            outs, lses, mailboxes, axis_name=axis_name, implementation=implementation
        )
        return own_share(merged, axis_name, 2) if own_heads else merged
    if exchange == "heads":
        outs, lses = _unpacked(_deal_heads(_packed(outs, lses), axis_name), outs.dtype)
        merged = merge_partials(outs, lses, implementation=implementation)
        return merged if own_heads else _gathered(merged, axis_name, 2)
    partials = _gathered((outs, lses), axis_name, 0)
    if own_heads:
        partials = own_share(partials, axis_name, 3)
    return merge_partials(*partials, implementation=implementation)


def own_share(
    results: tuple[jax.Array, jax.Array], axis_name: str, dimension: int
) -> tuple[jax.Array, jax.Array]:
    """Takes this device's of n equal shares of a dimension of out and lse."""
    size = results[0].shape[dimension] // jax.lax.axis_size(axis_name)
    first = jax.lax.axis_index(axis_name) * size
    out, lse = (jax.lax.dynamic_slice_in_dim(x, first, size, dimension) for x in results)
    return out, lse


def _gathered(
    results: tuple[jax.Array, jax.Array], axis_name: str, dimension: int
) -> tuple[jax.Array, jax.Array]:
    out, lse = (_manual_axes.gather(x, axis_name, dimension) for x in results)
    return out, lse


def _packed(outs: jax.Array, lses: jax.Array) -> jax.Array:
    """Puts both into one array of words, uint32 `[..., d * itemsize / 4 + 1]`, to travel as one.

    Numbers of another type would not do: what a float's half looks like may be changed on the way.
    """
    if outs.dtype.itemsize == 2:
        outs = outs.reshape(*outs.shape[:-1], -1, 2)
    words = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (outs, lses[..., None])]
    return jnp.concatenate(words, axis=-1)


def _unpacked(packed: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    outs = jax.lax.bitcast_convert_type(packed[..., :-1], dtype)  # [..., words(, halves)]
    lses = jax.lax.bitcast_convert_type(packed[..., -1], jnp.float32)
    return outs.reshape(*lses.shape, -1), lses


def _deal_heads(partials: jax.Array, axis_name: str) -> jax.Array:
    """Gives away `[k, b, s_q, h_q, words]` for `[n * k, b, s_q, h_q / n, words]` of all devices."""
    return jax.lax.all_to_all(partials, axis_name, split_axis=3, concat_axis=0, tiled=True)
