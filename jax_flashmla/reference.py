"""MLA decode in pure JAX: the definition, and the streamed lowering for hosts without the kernel.

Both take the queries joined, `[q_latent, q_rope]` along the last axis, and return the natural
log-sum-exp with -inf on rows that see no key.
"""

import functools

import jax
import jax.numpy as jnp

from jax_flashmla._shapes import HEAD_DIM_QK, HEAD_DIM_V, PAGE_SIZE

CHUNK_PAGES = 8  # pages per step of the streamed lowering: 1.2 MB of float32, at home in a cache


def definition(
    q: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Defines MLA decode: attention whose values are the first 512 columns of its keys.

    For reading, and for checks on small inputs that are all finite: it gathers every page of the
    table, whatever the lengths.

    Args:
        q: `[b, s_q, h_q, 576]`.
        kv_cache: `[num_pages, 64, h_kv, 576]`.
        block_table: int32 `[b, max_pages_per_seq]`.
        cache_seqlens: int32 `[b]`.
        softmax_scale: factor of the logits.
        causal: query j sees the keys `k < seqlen - (s_q - 1 - j)`, else `k < seqlen`.

    Returns:
        out float32 `[b, s_q, h_q, 512]` and lse float32 `[b, s_q, h_q]`.
    """
    q, k = _by_kv_head(q, kv_cache.shape[2]), _gather_all(kv_cache, block_table)
    logits = jnp.einsum("bjngd,bknd->bjngk", q, k, precision="highest") * softmax_scale
    logits = jnp.where(_visible(q, k, cache_seqlens, causal), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse))
    out = jnp.einsum("bjngk,bknd->bjngd", p, k[..., :HEAD_DIM_V], precision="highest")
    shape = (q.shape[0], q.shape[1], -1)
    return out.reshape(*shape, HEAD_DIM_V), lse.reshape(shape)


def streamed(
    q: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Computes `definition` request by request, over chunks of pages, in float32.

    Work follows the lengths, and memory beyond inputs and results is one chunk of keys and one
    request's accumulator, whatever the width of the table. Nothing past a length is used.
    The online softmax is that of Milakov and Gimelshein (arXiv:1805.02867).

    Args and returns are those of `definition`, except that out has the dtype of q.
    """
    b, s_q, h_q, _ = q.shape
    h_kv = kv_cache.shape[2]
    packed = jnp.moveaxis(q.reshape(b, s_q, h_kv, h_q // h_kv, HEAD_DIM_QK), 2, 1)
    table = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % CHUNK_PAGES)))
    lengths = jnp.clip(cache_seqlens, 0, block_table.shape[1] * PAGE_SIZE)
    attend = functools.partial(_attend, kv_cache, softmax_scale, causal)
    out, lse = jax.lax.map(lambda request: attend(*request), (packed, table, lengths))
    out = jnp.moveaxis(out, 1, 2).reshape(b, s_q, h_q, HEAD_DIM_V)
    return out, jnp.moveaxis(lse, 1, 2).reshape(b, s_q, h_q)


def _attend(
    kv_cache: jax.Array,
    softmax_scale: float,
    causal: bool,
    q: jax.Array,
    pages: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attends one request: q `[h_kv, s_q, g, 576]`, pages `[n]`, a scalar length."""
    rows = q.shape[:-1]
    scaled = q.astype(jnp.float32) * softmax_scale
    chunk = CHUNK_PAGES * PAGE_SIZE
    limits = _limits(length[None], rows[1], causal).reshape(1, -1, 1, 1)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slots = jax.lax.dynamic_slice(pages, (i * CHUNK_PAGES,), (CHUNK_PAGES,))
        positions = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        keys = _gather(kv_cache, slots, positions < length)
        visible = positions.reshape(1, 1, 1, -1) < limits
        return _online_softmax(scaled, keys, visible, *state)

    zeros = jnp.zeros_like(scaled[..., :HEAD_DIM_V])  # like q, also in its varying manual axes
    start = jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0], zeros
    steps = (length + chunk - 1) // chunk
    top, total, acc = jax.lax.fori_loop(0, steps, step, start)
    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[..., None]
    return out.astype(q.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _online_softmax(
    q: jax.Array,
    keys: jax.Array,
    visible: jax.Array,
    top: jax.Array,
    total: jax.Array,
    acc: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds a chunk of keys `[k, h_kv, 576]` to the running maximum, sum and weighted values."""
    logits = jnp.einsum("njgd,knd->njgk", q, keys, precision="highest")
    logits = jnp.where(visible, logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(axis=-1))
    finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # -inf - -inf is NaN
    p = jnp.exp(logits - finite_top[..., None])
    rescale = jnp.exp(top - finite_top)
    values = jnp.einsum("njgk,knd->njgd", p, keys[..., :HEAD_DIM_V], precision="highest")
    return new_top, total * rescale + p.sum(axis=-1), acc * rescale[..., None] + values


def _gather(kv_cache: jax.Array, slots: jax.Array, inside: jax.Array) -> jax.Array:
    """Gathers pages as float32 `[k, h_kv, 576]`, zeros past the length and outside the pool.

    Zeros rather than a mask on the weights alone, because 0 * NaN is NaN.
    """
    pages = kv_cache.at[slots].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    keys = pages.reshape(-1, *kv_cache.shape[2:])
    return jnp.where(inside[:, None, None], keys, 0).astype(jnp.float32)


def _gather_all(kv_cache: jax.Array, block_table: jax.Array) -> jax.Array:
    """Gathers the pages of whole tables as float32 `[b, k, h_kv, 576]`."""
    pages = kv_cache.at[block_table].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return pages.astype(jnp.float32).reshape(block_table.shape[0], -1, *kv_cache.shape[2:])


def _by_kv_head(q: jax.Array, h_kv: int) -> jax.Array:
    """Groups the query heads by their KV head: float32 `[b, s_q, h_kv, g, 576]`."""
    b, s_q, h_q, d = q.shape
    return q.astype(jnp.float32).reshape(b, s_q, h_kv, h_q // h_kv, d)


def _visible(q: jax.Array, k: jax.Array, cache_seqlens: jax.Array, causal: bool) -> jax.Array:
    """Marks which key each query sees: bool `[b, s_q, 1, 1, k]`."""
    limits = _limits(cache_seqlens, q.shape[1], causal)
    positions = jnp.arange(k.shape[1], dtype=jnp.int32)
    return positions.reshape(1, 1, 1, 1, -1) < limits[..., None, None, None]


def _limits(lengths: jax.Array, s_q: int, causal: bool) -> jax.Array:
    """Counts the keys each query may see, int32 `[b, s_q]`: the last query sees all of them."""
    after = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32) if causal else jnp.zeros(s_q, jnp.int32)
    return lengths[:, None] - after[None, :]
