"""Which device of a mesh axis holds which page of a sequence, in NumPy and in JAX alike.

Page p of a sequence, its tokens [64 p, 64 p + 64), lives on device `p % n` and is there the
sequence's page `p // n`. Round robin gives every device the same share of any length to within one
page, also while the sequence grows; consecutive chunks would leave the last devices idle until it
is long.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _shapes
from jax_flashmla._shapes import PAGE_SIZE

Array = jax.Array | np.ndarray


def share(tokens: Array, device: int | Array, num_devices: int) -> Array:
    """Counts the tokens that a device holds of a sequence's first ones.

    Args:
        tokens: int32, at least 0; any shape.
        device: which device of the axis; it may be traced.
        num_devices: devices of the axis, n.
    """
    pages, rest = tokens // PAGE_SIZE, tokens % PAGE_SIZE
    whole = (pages - device + (num_devices - 1)) // num_devices  # at least 0: device < n
    return whole * PAGE_SIZE + rest * (pages % num_devices == device).astype(rest.dtype)


def split_seqlens(cache_seqlens: Array, num_devices: int) -> Array:
    """Counts the tokens of each request that each device holds.

    It tells one allocator per device how far its share of a request has grown::

        held = split_seqlens(lengths + new, n) - split_seqlens(lengths, n)     # [n, b]
        for pool, counts in zip(pools, held):                                   # PagePools
            pool.append(dict(zip(names, counts)))
        tables = np.stack([pool.rows(names).block_table for pool in pools])     # [n, b, width]
        slots = split_slots(tables, positions)                                  # [n, b, s]

    Args:
        cache_seqlens: int32 `[b]`, tokens of each request on all devices together.
        num_devices: devices of the axis, n.

    Returns:
        int32 `[n, b]`.

    Raises:
        ValueError: the shape or the count is wrong.
        TypeError: the dtype or the count is wrong.
    """
    _shapes.check_seqlens(cache_seqlens)
    n, xp = _shapes.check_count("num_devices", num_devices), _namespace(cache_seqlens)
    return share(xp.maximum(cache_seqlens, 0)[None], xp.arange(n, dtype=xp.int32)[:, None], n)


def split_block_table(block_table: Array, num_devices: int) -> Array:
    """Deals the columns of a table out to the devices.

    Args:
        block_table: int32 `[b, max_pages_per_seq]`. Entry p of a row is a page number in the pool
            of device `p % n`.
        num_devices: devices of the axis, n.

    Returns:
        int32 `[n, b, ceil(max_pages_per_seq / n)]`, the table of each device; -1 where the given
        one has no column.

    Raises:
        ValueError: the shape or the count is wrong.
        TypeError: the dtype or the count is wrong.
    """
    _shapes.check_shape("block_table", block_table, ("b", "max_pages_per_seq"))
    _shapes.check_dtype("block_table", block_table, jnp.int32)
    n, xp = _shapes.check_count("num_devices", num_devices), _namespace(block_table)
    padding = (0, 0), (0, -block_table.shape[1] % n)
    padded = xp.pad(block_table, padding, constant_values=-1)
    width = padded.shape[1] // n
    return padded.reshape(-1, width, n).transpose(2, 0, 1)


def split_slots(block_tables: Array, positions: Array) -> Array:
    """Says where each device writes new tokens, for `cache.append` on each of them.

    Args:
        block_tables: int32 `[n, b, width]`, the table of each device.
        positions: int32 `[b, s]`, the places of the new tokens in their requests, -1 for none.

    Returns:
        int32 `[n, b, s]`: `page * 64 + offset` on the one device that holds the token's page, -1
        on all others, and everywhere for a token without a place in the tables.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    _shapes.check_shape("block_tables", block_tables, ("n", "b", "width"))
    _shapes.check_shape("positions", positions, (block_tables.shape[1], "s"))
    for name, array in (("block_tables", block_tables), ("positions", positions)):
        _shapes.check_dtype(name, array, jnp.int32)
    xp = _namespace(block_tables)
    (n, _, width), page = block_tables.shape, positions // PAGE_SIZE
    if width == 0:
        return xp.full((n, *positions.shape), -1, xp.int32)
    inside = (positions >= 0) & (page < n * width)
    column = xp.where(inside, page // n, 0)
    entries = xp.take_along_axis(block_tables, xp.broadcast_to(column, (n, *page.shape)), axis=2)
    devices = xp.arange(n, dtype=xp.int32).reshape(-1, 1, 1)
    held = inside[None] & ((page % n)[None] == devices) & (entries >= 0)
    return xp.where(held, entries * PAGE_SIZE + (positions % PAGE_SIZE)[None], -1)


def _namespace(array: Array) -> ModuleType:
    return jnp if isinstance(array, jax.Array) else np
