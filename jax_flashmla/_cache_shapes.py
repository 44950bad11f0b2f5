"""Checks of the cache operations' arguments, in the manner of `_shapes`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla._shapes import (
    HEAD_DIM_QK,
    KV_LORA_RANK,
    PAGE_SIZE,
    ROPE_DIM,
    check_dtype,
    check_float,
    check_shape,
)

ROPE_PAIRS = ROPE_DIM // 2
MAX_PAGES = (2**31 - 1) // PAGE_SIZE  # beyond it slots leave int32


@dataclasses.dataclass(frozen=True)
class MergeShape:
    """The dimensions of one merge.

    Attributes:
        partials: how many, n.
        rows: the dimensions between n and d.
        head_dim: columns, d.
    """

    partials: int
    rows: tuple[int, ...]
    head_dim: int

    @property
    def is_trivial(self) -> bool:
        """True when there is no partial or no row, so that nothing needs to run."""
        return 0 in (self.partials, math.prod(self.rows))


def check_append(
    cache: jax.Array, latent: jax.Array, rope: jax.Array, slots: jax.Array, *rotation: jax.Array
) -> None:
    """Checks the arrays of `append`, `rotation` being cos and sin or nothing.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    check_pool(cache, 1)
    check_shape("latent", latent, ("n", KV_LORA_RANK))
    rows = latent.shape[0]
    check_shape("rope", rope, (rows, ROPE_DIM))
    for name, array in (("latent", latent), ("rope", rope)):
        check_dtype(name, array, cache.dtype)
    _check_rows(rows, slots, rotation)


def check_append_projected(
    cache: jax.Array,
    projected: jax.Array,
    slots: jax.Array,
    latent_norm: jax.Array,
    *rotation: jax.Array,
) -> None:
    """Checks the arrays of `append_projected`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    check_pool(cache, 1)
    check_shape("projected", projected, ("n", "w"))
    rows, width = projected.shape
    if width < HEAD_DIM_QK:
        raise ValueError(f"projected: got {width} columns, expected at least {HEAD_DIM_QK}")
    check_shape("latent_norm", latent_norm, (KV_LORA_RANK,))
    for name, array in (("projected", projected), ("latent_norm", latent_norm)):
        check_dtype(name, array, cache.dtype)
    _check_rows(rows, slots, rotation)


def _check_rows(rows: int, slots: jax.Array, rotation: tuple[jax.Array, ...]) -> None:
    check_shape("slots", slots, (rows,))
    check_dtype("slots", slots, jnp.int32)
    for name, array in zip(("cos", "sin"), rotation, strict=bool(rotation)):
        check_shape(name, array, (rows, ROPE_PAIRS))
        check_dtype(name, array, jnp.float32)


def check_gather(
    cache: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array
) -> tuple[int, int, int, int]:
    """Checks the arrays of `gather` and returns the shape of its result.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    check_pool(cache, "h_kv")
    check_shape("block_table", block_table, ("b", "max_pages_per_seq"))
    check_dtype("block_table", block_table, jnp.int32)
    batch, width = block_table.shape
    check_shape("cache_seqlens", cache_seqlens, (batch,))
    check_dtype("cache_seqlens", cache_seqlens, jnp.int32)
    return batch, width * PAGE_SIZE, cache.shape[2], HEAD_DIM_QK


def check_pool(cache: jax.Array, h_kv: int | str) -> None:
    """Checks a page pool `[num_pages, 64, h_kv, 576]`.

    Raises:
        ValueError: the shape is wrong, or its slots leave int32.
        TypeError: the dtype is wrong.
    """
    check_shape("cache", cache, ("num_pages", PAGE_SIZE, h_kv, HEAD_DIM_QK))
    check_float("cache", cache)
    if cache.shape[0] > MAX_PAGES:
        raise ValueError(f"cache: got {cache.shape[0]} pages, expected at most {MAX_PAGES}")


def check_merge(outs: jax.Array, lses: jax.Array) -> MergeShape:
    """Checks the arrays of `merge_partials`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    if len(outs.shape) < 2:
        raise ValueError(f"outs: got shape {list(outs.shape)}, expected [n, ..., d]")
    check_float("outs", outs)
    check_shape("lses", lses, outs.shape[:-1])
    check_dtype("lses", lses, jnp.float32)
    return MergeShape(outs.shape[0], outs.shape[1:-1], outs.shape[-1])


def check_rotation(x: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    """Checks the arrays of `rope.rotate`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    if x.shape[-1:] != (ROPE_DIM,):
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {ROPE_DIM}]")
    check_float("x", x)
    for name, array in (("cos", cos), ("sin", sin)):
        fits = len(array.shape) == len(x.shape) and all(
            have in (1, want) for have, want in zip(array.shape[:-1], x.shape[:-1], strict=True)
        )
        if not fits or array.shape[-1] != ROPE_PAIRS:
            rows = ", ".join([*(f"{size} or 1" for size in x.shape[:-1]), str(ROPE_PAIRS)])
            raise ValueError(f"{name}: got shape {list(array.shape)}, expected [{rows}]")
        check_dtype(name, array, jnp.float32)


def check_out_dtype(dtype: jnp.dtype) -> np.dtype:
    """Checks the static dtype of a result.

    Raises:
        TypeError: it is none of the three.
    """
    try:
        given = jnp.dtype(dtype)
    except TypeError:
        given = None
    if given not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"dtype: got {dtype!r}, expected bfloat16, float16 or float32")
    return given
