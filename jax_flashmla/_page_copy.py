"""Copies of pages within the pool, in every layer: the device half of `jax_flashmla.pages`."""

import jax
import jax.numpy as jnp

from jax_flashmla import _cache_shapes, _shapes


def copy_pages(cache: jax.Array, copies: jax.Array, *, num_pages: int | None = None) -> jax.Array:
    """Copies pages to other pages of the pool, as copy on write asks for.

    In one line, for pages inside the pool::

        cache = cache.at[copies[:, 1]].set(cache[copies[:, 0]])

    A pair with a page outside the pool, such as (-1, -1), copies nothing and costs nothing. No page
    may be both a source and a destination. `jax_flashmla.pages.PagePool.append` says which copies
    an append needs: apply them before its slots are written. Most steps need none: call this only
    where ``(copies >= 0).any()`` on the host. In place where the cache is donated.

    Args:
        cache: page pool `[num_pages, 64, 1, 576]`, or the flat pool of layers.
        copies: int32 `[n, 2]`, source and destination page.
        num_pages: pages of each layer of a flat pool, whose layers all make the same copies; None
            for a pool of one layer.

    Returns:
        The cache with the pages copied.

    Raises:
        ValueError: a shape is wrong, or the pool is no whole number of layers.
        TypeError: a dtype is wrong, or `num_pages` is traced.
    """
    cache, copies = _shapes.as_arrays(cache=cache, copies=copies)
    _cache_shapes.check_pool(cache, 1)
    _shapes.check_shape("copies", copies, ("n", 2))
    _shapes.check_dtype("copies", copies, jnp.int32)
    pages = cache.shape[0] if num_pages is None else _shapes.check_count("num_pages", num_pages)
    if cache.shape[0] % pages:
        raise ValueError(
            f"num_pages: got {pages}, expected a divisor of the pool's {cache.shape[0]} pages"
        )
    if not copies.shape[0]:
        return cache
    inside = ((copies >= 0) & (copies < pages)).all(axis=1)
    ordered = copies[jnp.argsort(~inside)]  # those that count come first

    firsts = jnp.arange(0, cache.shape[0], pages, dtype=jnp.int32)  # [layers]

    def copy(i: jax.Array, cache: jax.Array) -> jax.Array:
        source, destination = ordered[i]
        # A fusion that read and wrote the pool would need a copy of it.
        taken = jax.lax.optimization_barrier(cache[firsts + source])  # [layers, 64, 1, 576]
        return cache.at[firsts + destination].set(taken, unique_indices=True)

    return jax.lax.fori_loop(0, inside.sum(dtype=jnp.int32), copy, cache)
