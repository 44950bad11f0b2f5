"""Attention of many new tokens over the cache: prefill, and chunks of it over a cached prefix.

The keys and values are un-absorbed from the latents a block at a time. Per key that costs
`512 (qk_nope_head_dim + v_head_dim)` multiply-adds and head, and each query saves 768 of them: from
some hundred queries on it is the cheaper form, below that `layer.decode` is.
"""

import functools

import jax
import jax.numpy as jnp

from jax_flashmla import _manual_axes, _page_shares, cache
from jax_flashmla._dispatch import Implementation
from jax_flashmla._shapes import KV_LORA_RANK, PAGE_SIZE
from jax_flashmla.mla import layer
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.step import Step
from jax_flashmla.mla.weights import MLAWeights

# A block's float32 logits are 67 MB at 128 heads: little beside the cache, enough for the matmuls.
BLOCK_QUERIES = 256
BLOCK_PAGES = 8

State = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, sum, weighted values


def prefill(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one layer on up to s_q new tokens of each request, behind what is cached already.

    Args:
        weights: of the layer.
        config: of the model.
        x: normalised hidden states `[b, s_q, hidden]`, in the dtype of weights and pool. Rows
            behind a request's `query_lens` may hold anything.
        pool: page pool `[num_pages, 64, 1, 576]`; donate it to the outermost `jax.jit`.
        step: from `prefill_step`, for a flat pool `step.at_layer(layer, num_pages)`.
        implementation: as in `mla_decode`, for the cache operations.

    Returns:
        `[b, s_q, hidden]` to add to the residual stream, 0 (or the output's bias) on padding rows,
        and the pool with the new tokens.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    q_nope, q_rope, pool = layer.project_and_append(
        weights, config, x, pool, step, implementation=implementation
    )
    out, _ = attend(weights, config, q_nope, q_rope, pool, step, implementation=implementation)
    return layer.project_out(weights, out), pool


def attend(
    weights: MLAWeights,
    config: MLAConfig,
    q_nope: jax.Array,
    q_rope: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    axis_name: str | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the cached tokens of each request, aligned to their end.

    With k and v un-absorbed from a request's latents, and query j at position
    `p = cache_seqlens - query_lens + j`, for the rows `j < query_lens`::

        logits = jnp.einsum("qhd,khd->qhk", q, k) * softmax_scale
        logits = jnp.where(key <= p, logits, -jnp.inf)
        out = jnp.einsum("qhk,khd->qhd", jax.nn.softmax(logits), v)

    Streamed over blocks of keys, un-absorbed once each, and within one over the blocks of queries
    that see it (online softmax, Milakov and Gimelshein, arXiv:1805.02867): beyond inputs and result
    memory is a float32 accumulator `[s_q, h_q, v_head_dim]` and one block, whatever the context,
    and time follows the lengths.

    Args:
        weights: of the layer; `key_up` and `value_up` are used.
        config: of the model.
        q_nope: `[b, s_q, h_q, qk_nope_head_dim]`.
        q_rope: `[b, s_q, h_q, 64]`, rotated.
        pool: page pool with the new tokens.
        step: from `prefill_step`; its tables, `cache_seqlens` and `query_lens` are used.
        axis_name: inside `jax.shard_map`, the axis whose n devices hold the pages of each request,
            page p device `p % n`; pool and tables are then this device's, lengths the whole ones.
        implementation: as in `cache.gather`.

    Returns:
        out `[b, s_q, h_q, v_head_dim]` of q's dtype, 0 on padding rows, and lse float32
        `[b, s_q, h_q]`, the natural log-sum-exp of the scaled logits, -inf on those rows.
    """
    s_q = q_nope.shape[1]
    block = min(BLOCK_QUERIES, max(1, s_q))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    q = jnp.pad(q, ((0, 0), (0, -s_q % block), (0, 0), (0, 0)))
    width = step.block_table.shape[1]
    table = jnp.pad(step.block_table, ((0, 0), (0, -width % BLOCK_PAGES)), constant_values=-1)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    lengths = jnp.clip(step.cache_seqlens, 0, width * devices * PAGE_SIZE)
    rows = functools.partial(_cached_rows, pool, implementation, axis_name)
    unpack = functools.partial(_keys_and_values, weights, rows)
    attend_one = functools.partial(_attend_one, unpack, config.softmax_scale, block, devices)
    queries = jnp.clip(step.query_lens, 0, s_q)
    # Not from the clipped length: what the table cannot hold is missing, it moves no query.
    offsets = step.cache_seqlens - step.query_lens
    out, lse = jax.lax.map(lambda one: attend_one(*one), (q, table, lengths, queries, offsets))
    return out[:, :s_q], lse[:, :s_q]


def _attend_one(
    unpack: functools.partial,
    softmax_scale: float,
    block: int,
    devices: int,
    q: jax.Array,
    pages: jax.Array,
    length: jax.Array,
    queries: jax.Array,
    offset: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attends one request: q `[s_q, h_q, qk_head_dim]`, pages `[n]`; scalars, offset of query 0."""
    keys_per_block = BLOCK_PAGES * devices * PAGE_SIZE
    value_up = unpack.args[0].value_up
    start = (
        jnp.full(q.shape[:2], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:2], jnp.float32),
        jnp.zeros((*q.shape[:2], value_up.shape[-1]), jnp.float32),
    )
    start = tuple(_manual_axes.align([*start, q, value_up])[:3])  # a loop keeps what varies

    def key_block(i: jax.Array, state: State) -> State:
        first_key = i * keys_per_block
        k, v = unpack(
            jax.lax.dynamic_slice(pages, (i * BLOCK_PAGES,), (BLOCK_PAGES,)), length - first_key
        )
        key_positions = first_key + jnp.arange(keys_per_block, dtype=jnp.int32)

        def query_block(j: jax.Array, state: State) -> State:
            first = j * block
            rows = first + jnp.arange(block, dtype=jnp.int32)
            limits = jnp.where(rows < queries, jnp.minimum(offset + rows + 1, length), 0)
            visible = key_positions[None] < limits[:, None]  # [block, keys]
            part = [jax.lax.dynamic_slice_in_dim(x, first, block) for x in (q, *state)]
            updated = _online_softmax(part[0], k, v, visible, softmax_scale, *part[1:])
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, new, first, 0)
                for x, new in zip(state, updated, strict=True)
            )

        # The first query that sees this block of keys stands at first_key.
        lowest = jnp.maximum(first_key - offset, 0) // block
        return jax.lax.fori_loop(lowest, (queries + block - 1) // block, query_block, state)

    blocks = (length + keys_per_block - 1) // keys_per_block
    top, total, acc = jax.lax.fori_loop(0, blocks, key_block, start)
    empty = total == 0
    out = acc / jnp.where(empty, 1.0, total)[..., None]
    return out.astype(q.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _cached_rows(
    pool: jax.Array,
    implementation: Implementation,
    axis_name: str | None,
    pages: jax.Array,
    length: jax.Array,
) -> jax.Array:
    """A block's rows `[keys, 576]` of this device's pages, or of all devices' in their order."""
    if axis_name is not None:
        n, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
        keys = n * len(pages) * PAGE_SIZE
        length = _page_shares.share(jnp.clip(length, 0, keys), device, n)
    rows = cache.gather(pool, pages[None], length[None], implementation=implementation)[0, :, 0]
    if axis_name is None:
        return rows
    paged = rows.reshape(len(pages), 1, PAGE_SIZE, -1)
    return _manual_axes.gather(paged, axis_name, 1).reshape(keys, -1)


def _keys_and_values(
    weights: MLAWeights, cached_rows: functools.partial, pages: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Un-absorbs a block: k `[keys, h_q, qk_head_dim]` and v `[keys, h_q, v_head_dim]`."""
    rows = cached_rows(pages, length)
    latent, rope = rows[:, :KV_LORA_RANK], rows[:, KV_LORA_RANK:]
    product = functools.partial(jnp.einsum, precision="highest")
    k_nope = product("kc,hnc->khn", latent, weights.key_up)
    k_rope = jnp.broadcast_to(rope[:, None], (*k_nope.shape[:2], rope.shape[-1]))
    v = product("kc,hcv->khv", latent, weights.value_up)
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


def _online_softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    softmax_scale: float,
    top: jax.Array,
    total: jax.Array,
    acc: jax.Array,
) -> State:
    """Adds a block of keys to the running maximum, sum and weighted values, all float32."""
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    logits = product("qhd,khd->qhk", q, k) * softmax_scale
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(axis=-1))
    finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # -inf - -inf is NaN
    p = jnp.exp(logits - finite_top[..., None])
    rescale = jnp.exp(top - finite_top)
    values = product("qhk,khd->qhd", p.astype(v.dtype), v)
    return new_top, total * rescale + p.sum(axis=-1), acc * rescale[..., None] + values
