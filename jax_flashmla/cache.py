"""The paged latent cache: one flat pool for all layers, append in place, gather.

A pool `[num_pages, 64, 1, 576]` holds a token per slot, `slot = page * 64 + offset`: its latent of
512 numbers, then its rotated key of 64. `make_pool` makes one pool for all layers, in which
`layer_block_table` and `layer_slots` find a layer's part::

    def layer(carry, inputs):                       # under jax.lax.scan over the layers
        x, pool = carry
        index, weights = inputs
        ...
        pool = append(pool, latent, rope, layer_slots(slots, index, num_pages))
        table = layer_block_table(block_table, index, num_pages)
        out, _ = mla_decode(q_latent, q_rope, pool, table, cache_seqlens, softmax_scale=scale)
        ...
        return (x, pool), None

With the pool donated to the outermost `jax.jit` nothing of its size is copied or allocated.
"""

import jax

from jax_flashmla import _cache_primitives, _cache_shapes, _dispatch, _shapes
from jax_flashmla._dispatch import Implementation
from jax_flashmla._page_copy import copy_pages
from jax_flashmla._pool import layer_block_table, layer_slots, make_pool

__all__ = [
    "append",
    "append_projected",
    "copy_pages",
    "gather",
    "layer_block_table",
    "layer_slots",
    "make_pool",
]


def append(
    cache: jax.Array,
    latent: jax.Array,
    rope: jax.Array,
    slots: jax.Array,
    *,
    cos: jax.Array | None = None,
    sin: jax.Array | None = None,
    rope_interleave: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """Writes the newest tokens into the cache.

    In three lines, for slots inside the pool::

        rope = rotate(rope, cos, sin, interleave=rope_interleave)      # given cos and sin
        rows = jnp.concatenate([latent, rope], axis=-1)                 # [n, 576]
        cache = cache.reshape(-1, 576).at[slots].set(rows).reshape(cache.shape)

    A slot of -1, or any other outside the pool, writes nothing: that is what the padded rows of a
    batch use. Two rows with the same slot are the caller's error; which one stays is unspecified.

    In place where XLA may overwrite the cache: donate it to `jax.jit`
    (`donate_argnums`), and carry it through loops. Without donation XLA copies the pool first.

    Over a mesh all arrays are whole on every device, or rows and pages are sharded over the same
    axes: then slots count from the first page of their device.

    Args:
        cache: page pool `[num_pages, 64, 1, 576]`, bfloat16, float16 or float32.
        latent: `[n, 512]` of the same dtype, after its normalisation.
        rope: rotary key `[n, 64]` of the same dtype, rotated already unless cos and sin are given.
        slots: int32 `[n]`, `page * 64 + offset` of each row.
        cos: float32 `[n, 32]`, to rotate rope as `jax_flashmla.rope.rotate` does, in float32 and
            rounded once; None with sin None to store it as it is.
        sin: float32 `[n, 32]`.
        rope_interleave: whether rope holds the pairs that rotate together in neighbouring columns.
            What is stored has the half-split order in either case: rotate the queries by the same
            function. Only with cos and sin.
        implementation: "cuda" for the kernel or an error that says why it cannot run, "xla" for
            the portable lowering, None for the kernel wherever it can run. float32 has no kernel.

    Returns:
        The cache with the rows written, `[num_pages, 64, 1, 576]`.

    Raises:
        ValueError: a shape, value or sharding is wrong; rows are mapped by vmap over one pool.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    arrays = _shapes.as_arrays(cache=cache, latent=latent, rope=rope, slots=slots)
    interleave = _shapes.check_flag("rope_interleave", rope_interleave)
    arrays = (*arrays, *_rotation(cos, sin, interleave))
    _cache_shapes.check_append(*arrays)
    _dispatch.check_request(implementation, _dispatch.dtype_refusal(arrays[0].dtype))
    return _cache_primitives.append(arrays, interleave=interleave, implementation=implementation)


def append_projected(
    cache: jax.Array,
    projected: jax.Array,
    slots: jax.Array,
    *,
    latent_norm: jax.Array,
    norm_eps: float,
    cos: jax.Array,
    sin: jax.Array,
    rope_interleave: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """Norms, rotates and writes the newest tokens, as a layer's down projection gives them.

    In four lines, of which the kernel is one::

        latent, rope = jnp.split(projected[:, -576:], [512], axis=-1)
        scale = jax.lax.rsqrt(jnp.mean(latent**2, -1, keepdims=True) + norm_eps)  # in float32
        latent = latent * scale * latent_norm                                     # rounded once
        cache = append(cache, latent, rope, slots, cos=cos, sin=sin, ...)

    Slots, donation and meshes are as in `append`.

    Args:
        cache: page pool `[num_pages, 64, 1, 576]`, bfloat16, float16 or float32.
        projected: `[n, w]` of the same dtype, w ≥ 576: the last 576 columns of a row are its latent
            before the norm and its rotary key before the rotation. For the kernel w is a multiple
            of 8.
        slots: int32 `[n]`, `page * 64 + offset` of each row, -1 for none.
        latent_norm: the norm's weights `[512]`, of the cache's dtype.
        norm_eps: what the norm adds to the mean of squares.
        cos: float32 `[n, 32]`.
        sin: float32 `[n, 32]`.
        rope_interleave: as in `append`.
        implementation: as in `append`.

    Returns:
        The cache with the rows written, `[num_pages, 64, 1, 576]`.

    Raises:
        ValueError: a shape, value or sharding is wrong; rows are mapped by vmap over one pool.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    arrays = _shapes.as_arrays(
        cache=cache, projected=projected, slots=slots, latent_norm=latent_norm, cos=cos, sin=sin
    )
    interleave = _shapes.check_flag("rope_interleave", rope_interleave)
    eps = _shapes.check_positive("norm_eps", norm_eps)
    _cache_shapes.check_append_projected(*arrays)
    _dispatch.check_request(implementation, _cache_primitives.projected_refusal(*arrays))
    return _cache_primitives.append_projected(
        arrays, interleave=interleave, norm_eps=eps, implementation=implementation
    )


def gather(
    cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Copies the pages of each request to contiguous memory.

    For code that wants keys in one piece, such as prefill over a cached prefix::

        pages = cache[block_table]                                # [b, max_pages_per_seq, 64, ...]
        tokens = pages.reshape(b, max_pages_per_seq * 64, h_kv, 576)

    Zeros stand at and behind each length and for table entries that are out of range, whatever
    pages and entries hold there. Lengths below 0 count as 0, lengths beyond the table as the
    table's.

    Over a mesh the batch and the KV heads may be sharded. The pool is whole on every device, or its
    pages are sharded as the batch is: then the table names pages of its device.

    Args:
        cache: page pool `[num_pages, 64, h_kv, 576]`, bfloat16, float16 or float32.
        block_table: int32 `[b, max_pages_per_seq]`, the pages of each request.
        cache_seqlens: int32 `[b]`, cached tokens per request.
        implementation: as in `append`.

    Returns:
        `[b, max_pages_per_seq * 64, h_kv, 576]` of the cache's dtype.

    Raises:
        ValueError: a shape or sharding is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    arrays = _shapes.as_arrays(cache=cache, block_table=block_table, cache_seqlens=cache_seqlens)
    _cache_shapes.check_gather(*arrays)
    _dispatch.check_request(implementation, _dispatch.dtype_refusal(arrays[0].dtype))
    return _cache_primitives.gather(arrays, implementation=implementation)


def _rotation(
    cos: jax.Array | None, sin: jax.Array | None, interleave: bool
) -> tuple[jax.Array, ...]:
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: got one of them, expected both or None for both")
    if cos is not None:
        return _shapes.as_arrays(cos=cos, sin=sin)
    if interleave:
        raise ValueError("rope_interleave: got True without cos and sin, expected both with it")
    return ()
