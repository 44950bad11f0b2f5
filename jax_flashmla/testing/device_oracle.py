"""The oracle on the device: the same numbers as `oracle`, streamed over the pages in float64.

Work is cut into blocks of `BLOCK_ROWS / rows` requests with rows padded to a power of four, so
that a handful of compiled programs serves every shape of a test run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.testing import truth
from jax_flashmla.testing.cases import HEAD_DIM_V, PAGE_SIZE

GROUP = 8  # requests that are streamed together, where their rows are few
LARGE_ROWS = 4096
CHUNK_PAGES = 16
CHUNK = CHUNK_PAGES * PAGE_SIZE
TABLE_WIDTH = 2048
BLOCK_ROWS = 16384
NEUTRAL = -np.inf


def attend(
    q: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool,
) -> truth.Truth:
    """Exact paged attention of every row; arguments and result as in `oracle.attend`.

    Key 'tokens' of the result counts what the mask lets through, as there. Arrays of the result
    are float64 and live on the device.
    """
    with jax.enable_x64(True):
        blocks = _pack(q, block_table, cache_seqlens, kv_cache.shape[2], causal)
        scale = np.float64(softmax_scale)
        packed = [_stream(*block, kv_cache, scale) for block in blocks]
        return _unpack(packed, q.shape[:3], kv_cache.shape[2])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pack(
    q: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array, h_kv: int, causal: bool
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Blocks of (q [n, h_kv, rows, 576], block_table [n, width], visible int32 [n, rows])."""
    batch, s_q, h_q, _ = q.shape
    group = h_q // h_kv
    back = np.arange(s_q - 1, -1, -1, dtype=np.int32) * np.int32(causal)
    visible = jnp.maximum(cache_seqlens[:, None] - np.repeat(back, group)[None], 0)
    q = jnp.transpose(q.reshape(batch, s_q, h_kv, group, -1), (0, 2, 1, 3, 4))
    q = q.reshape(batch, h_kv, s_q * group, -1)

    rows = _padded_rows(s_q * group)
    size = _block_size(rows)
    more, extra = -batch % size, rows - s_q * group
    width = max(TABLE_WIDTH, block_table.shape[1]) - block_table.shape[1]
    q = jnp.pad(q, ((0, more), (0, 0), (0, extra), (0, 0)))
    visible = jnp.pad(visible, ((0, more), (0, extra)))
    table = jnp.pad(block_table, ((0, more), (0, width)))
    return [
        (q[i : i + size], table[i : i + size], visible[i : i + size])
        for i in range(0, batch + more, size)
    ]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unpack(packed: list[truth.Truth], dims: tuple[int, int, int], h_kv: int) -> truth.Truth:
    """Natural layout of the blocks' results: [batch, s_q, h_q, …]."""
    batch, s_q, h_q = dims
    group = h_q // h_kv

    def natural(*blocks: jax.Array) -> jax.Array:
        whole = jnp.concatenate(blocks)[:batch, :, : s_q * group]
        whole = whole.reshape(batch, h_kv, s_q, group, *whole.shape[3:])
        return jnp.moveaxis(whole, 1, 2).reshape(batch, s_q, h_q, *whole.shape[4:])

    return jax.tree.map(natural, *packed)


def _padded_rows(rows: int) -> int:
    """The next power of four from 16 on."""
    padded = 16
    while padded < rows:
        padded *= 4
    return padded


def _block_size(rows: int) -> int:
    return min(max(BLOCK_ROWS // rows, _group_size(rows)), 128)


def _group_size(rows: int) -> int:
    return 1 if rows >= LARGE_ROWS else GROUP


@jax.jit
def _stream(
    q: jax.Array, block_table: jax.Array, visible: jax.Array, kv_cache: jax.Array, scale: jax.Array
) -> truth.Truth:
    """Truth of one block, [n, h_kv, rows, …]: groups one after the other, pages in chunks."""

    def of_group(group: tuple[jax.Array, jax.Array, jax.Array]) -> truth.Truth:
        return _attend_group(*group, kv_cache, scale)

    size = _group_size(q.shape[2])
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (q, block_table, visible))
    done = jax.lax.map(of_group, groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


def _attend_group(
    q: jax.Array, block_table: jax.Array, visible: jax.Array, kv_cache: jax.Array, scale: jax.Array
) -> truth.Truth:
    """Truth of some requests: online softmax in float64 over chunks of pages."""
    dtype = q.dtype
    q = q.astype(jnp.float64)  # [group, h_kv, rows, 576]
    lengths = visible.max(axis=1)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, sums, magnitude, key_norm = carry
        token = i * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)[None]
        keys = _gather(kv_cache, block_table, lengths, i, token)  # [group, CHUNK, h_kv, 576]
        logits = scale * jnp.einsum("ghrd,gthd->ghrt", q, keys)
        seen = (token[:, None] < visible[..., None])[:, None]
        magnitude = jnp.maximum(magnitude, jnp.where(seen, jnp.abs(logits), 0.0).max(-1))
        key_norm = jnp.maximum(key_norm, jnp.linalg.norm(keys, axis=-1).max(1))
        logits = jnp.where(seen, logits, NEUTRAL)

        new_top = jnp.maximum(top, logits.max(-1))
        anchor = jnp.where(new_top == NEUTRAL, 0.0, new_top)
        weights = jnp.exp(logits - anchor[..., None])
        decay = jnp.exp(top - anchor)
        rounded = [_round(weights * 2.0**a, dtype) / 2.0**a for a in truth.ANCHORS]
        values = keys[..., :HEAD_DIM_V]
        added = jnp.einsum("aghrt,gthd->aghrd", jnp.stack([weights, *rounded]), values)
        total = total * decay + weights.sum(-1)
        return new_top, total, sums * decay[None, ..., None] + added, magnitude, key_norm

    rows = q.shape[:3]
    start = (
        jnp.full(rows, NEUTRAL),
        jnp.zeros(rows),
        jnp.zeros((1 + len(truth.ANCHORS), *rows, HEAD_DIM_V)),
        jnp.zeros(rows),
        jnp.zeros(rows[:2]),
    )
    chunks = (lengths.max() + CHUNK - 1) // CHUNK
    top, total, sums, magnitude, key_norm = jax.lax.fori_loop(0, chunks, step, start)
    seen = jnp.broadcast_to(visible[:, None], rows)
    outs = jnp.where(seen[None, ..., None] > 0, sums / total[None, ..., None], 0.0)
    errors = _round(outs[1:], dtype) - outs[:1]
    typical = scale * jnp.linalg.norm(q, axis=-1) * key_norm[..., None] / q.shape[-1] ** 0.5
    return truth.Truth(
        out=outs[0],
        lse=jnp.where(seen > 0, top + jnp.log(total), NEUTRAL),
        ideal_error=jnp.sqrt(jnp.mean(errors**2, axis=(0, -1))),
        magnitude=jnp.where(seen > 0, jnp.maximum(magnitude, typical), 0.0),
        tokens=seen.astype(jnp.float64),
    )


def _gather(
    kv_cache: jax.Array, table: jax.Array, lengths: jax.Array, chunk: jax.Array, token: jax.Array
) -> jax.Array:
    """Keys of one chunk, float64 [group, CHUNK, h_kv, 576]; zero beyond each length."""
    pages = jax.lax.dynamic_slice_in_dim(table, chunk * CHUNK_PAGES, CHUNK_PAGES, axis=1)
    keys = kv_cache[jnp.clip(pages, 0, kv_cache.shape[0] - 1)]
    keys = keys.reshape(-1, CHUNK, *kv_cache.shape[2:])
    used = token < lengths[:, None]
    zero = jnp.zeros((), keys.dtype)
    return jnp.where(used[..., None, None], keys, zero).astype(jnp.float64)


def _round(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Round float64 to the dtype and stay float64; XLA may drop a pair of conversions."""
    info = jnp.finfo(dtype)
    step = float(info.smallest_subnormal)  # reduce_precision flushes what is subnormal
    subnormal = jnp.round(x / step) * step
    normal = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return jnp.where(jnp.abs(x) < float(info.tiny), subnormal, normal)
