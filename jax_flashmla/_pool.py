"""The flat page pool of all layers, and where a layer's pages and slots are in it."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_flashmla import _cache_shapes, _shapes


def make_pool(num_layers: int, num_pages: int, *, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Allocates one flat pool for all layers, of zeros.

    Layer l owns the pages `[l * num_pages, (l + 1) * num_pages)`: every layer uses the same page
    numbers, offset by `layer_block_table` and `layer_slots`. Carried through a scan over layers the
    flat pool is never copied; a pool stacked by layers would be, slice by slice.

    Args:
        num_layers: layers, at least 1.
        num_pages: pages of each layer, at least 1.
        dtype: bfloat16, float16 or float32.

    Returns:
        `[num_layers * num_pages, 64, 1, 576]`.

    Raises:
        ValueError: a count is below 1, or the pool's slots leave int32.
        TypeError: a count or the dtype is wrong.
    """
    layers = _shapes.check_count("num_layers", num_layers)
    pages = _shapes.check_count("num_pages", num_pages)
    shape = layers * pages, _shapes.PAGE_SIZE, 1, _shapes.HEAD_DIM_QK
    described = jax.ShapeDtypeStruct(shape, _cache_shapes.check_out_dtype(dtype))
    _cache_shapes.check_pool(described, 1)
    return jnp.zeros(shape, described.dtype)


def layer_block_table(block_table: jax.Array, layer: int | jax.Array, num_pages: int) -> jax.Array:
    """Turns a layer's block table into one of the flat pool.

    Args:
        block_table: int32, page numbers of one layer in `[0, num_pages)`; any shape.
        layer: which layer, an int or an int32 scalar; it may be traced, as in a scan.
        num_pages: pages of each layer.

    Returns:
        int32 of the same shape, `layer * num_pages` added; entries outside the layer become -1.

    Raises:
        ValueError: `num_pages` is below 1.
        TypeError: a dtype is wrong, or `num_pages` is traced.
    """
    (block_table,) = _shapes.as_arrays(block_table=block_table)
    _shapes.check_dtype("block_table", block_table, jnp.int32)
    return offset(block_table, layer, _shapes.check_count("num_pages", num_pages))


def layer_slots(slots: jax.Array, layer: int | jax.Array, num_pages: int) -> jax.Array:
    """Turns a layer's slots into slots of the flat pool.

    Args:
        slots: int32, `page * 64 + offset` in `[0, num_pages * 64)`; any shape.
        layer: which layer, an int or an int32 scalar; it may be traced, as in a scan.
        num_pages: pages of each layer.

    Returns:
        int32 of the same shape, `layer * num_pages * 64` added; slots outside the layer become -1.

    Raises:
        ValueError: `num_pages` is below 1.
        TypeError: a dtype is wrong, or `num_pages` is traced.
    """
    (slots,) = _shapes.as_arrays(slots=slots)
    _shapes.check_dtype("slots", slots, jnp.int32)
    return offset(slots, layer, _shapes.check_count("num_pages", num_pages) * _shapes.PAGE_SIZE)


def offset(indices: jax.Array, layer: int | jax.Array, size: int) -> jax.Array:
    """Moves the indices in `[0, size)` to a layer's share of a flat axis; all others become -1."""
    layer = jnp.asarray(layer, jnp.int32)
    return jnp.where((indices >= 0) & (indices < size), indices + layer * size, -1)
