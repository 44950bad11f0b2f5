"""Prefill and its chunks against attention written out in float64, and what it costs in memory."""

import dataclasses

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import cache, mla
from jax_flashmla.mla import step as steps
from jax_flashmla.mla.prefill import BLOCK_PAGES, BLOCK_QUERIES, attend

HF = dense_stack.hf_config("deepseek_v3", num_hidden_layers=1, num_attention_heads=2)
HF |= {"num_key_value_heads": 2, "qk_nope_head_dim": 16, "v_head_dim": 24}
CONFIG = mla.MLAConfig.from_hf(HF)
KEYS = BLOCK_PAGES * 64
prefill = jax.jit(mla.prefill, static_argnums=1)


@pytest.fixture(scope="module")
def weights() -> mla.MLAWeights:
    prefix = "model.layers.0.self_attn."
    return mla.load_weights(dense_stack.random_tensors(HF), CONFIG, prefix=prefix)


@dataclasses.dataclass
class Batch:
    """A pool with NaN wherever no token is, queries, and the step that describes them."""

    pool: jax.Array
    q_nope: jax.Array
    q_rope: jax.Array
    step: mla.Step


def make_batch(lengths: list[int], queries: list[int], *, extra_rows: int = 0) -> Batch:
    rng = np.random.default_rng(0)
    width, s_q = -(-max(lengths) // 64) + 1, max(queries) + extra_rows
    num_pages = sum(-(-length // 64) for length in lengths) + 2
    pool = np.full((num_pages, 64, 1, 576), np.nan, np.float32)
    table = np.full((len(lengths), width), 2147480000, np.int32)
    free = iter(rng.permutation(num_pages))
    for row, length in enumerate(lengths):
        for page in range(-(-length // 64)):
            table[row, page] = next(free)
            count = min(64, length - page * 64)
            pool[table[row, page], :count] = rng.standard_normal((count, 1, 576))
    q = rng.standard_normal((len(lengths), s_q, 2, 16 + 64)).astype(np.float32)
    for row, count in enumerate(queries):
        q[row, count:] = np.nan  # padding rows
    slots = np.full((len(lengths), s_q), -1, np.int32)
    arrays = table, np.array(lengths, np.int32), np.array(queries, np.int32), slots
    step = mla.prefill_step(CONFIG, *map(jnp.asarray, arrays))
    q_nope, q_rope = jnp.split(jnp.asarray(q), [16], axis=-1)
    return Batch(jnp.asarray(pool), q_nope, q_rope, step)


def oracle(weights: mla.MLAWeights, batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """One request in float64: out `[queries, h_q, v_head_dim]` and lse `[queries, h_q]`."""
    length, count = int(batch.step.cache_seqlens[row]), int(batch.step.query_lens[row])
    pages = np.asarray(batch.step.block_table[row, : -(-length // 64)])
    rows = np.asarray(batch.pool, np.float64)[pages].reshape(-1, 576)[:length]
    key_up, value_up = np.asarray(weights.key_up, np.float64), np.asarray(weights.value_up)
    k = np.einsum("kc,hnc->khn", rows[:, :512], key_up)
    k = np.concatenate([k, np.broadcast_to(rows[:, None, 512:], (length, 2, 64))], -1)
    v = np.einsum("kc,hcv->khv", rows[:, :512], value_up)
    q = np.concatenate([batch.q_nope[row, :count], batch.q_rope[row, :count]], -1)
    logits = np.einsum("qhd,khd->qhk", q.astype(np.float64), k) * CONFIG.softmax_scale
    position = length - count + np.arange(count)
    logits[np.broadcast_to(np.arange(length) > position[:, None, None], logits.shape)] = -np.inf
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(-1)
    return np.einsum("qhk,khv->qhv", p / total[..., None], v), np.log(total) + top[..., 0]


def check(weights: mla.MLAWeights, batch: Batch) -> None:
    out, lse = jax.jit(attend, static_argnums=1)(
        weights, CONFIG, batch.q_nope, batch.q_rope, batch.pool, batch.step
    )
    for row, count in enumerate(np.asarray(batch.step.query_lens)):
        assert (np.asarray(out[row, count:]) == 0).all()
        assert np.isneginf(lse[row, count:]).all()
        if count:
            expected, expected_lse = oracle(weights, batch, row)
            np.testing.assert_allclose(out[row, :count], expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(lse[row, :count], expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [
        ([1], [1]),
        ([63, 64, 65, 0], [63, 64, 65, 0]),
        ([200, 70, 129], [3, 70, 64]),
        ([KEYS - 1, KEYS, KEYS + 1], [5, KEYS, 1]),
        ([KEYS + 100, 2 * KEYS], [BLOCK_QUERIES + 30, 2 * BLOCK_QUERIES]),
        ([300, 0, 64], [0, 0, 64]),
    ],
    ids=["one", "pages", "prefixes", "key blocks", "query blocks", "nothing new"],
)
def test_ragged_batches_over_cached_prefixes(
    weights: mla.MLAWeights, lengths: list[int], queries: list[int]
) -> None:
    check(weights, make_batch(lengths, queries, extra_rows=3))


def test_shared_pages(weights: mla.MLAWeights) -> None:
    batch = make_batch([150, 150], [20, 20])
    table = batch.step.block_table.at[1, :2].set(batch.step.block_table[0, :2])
    batch.step = batch.step._replace(block_table=table)
    check(weights, batch)


def test_128k_tokens_of_context(weights: mla.MLAWeights) -> None:
    """A few queries at the end of it: logits of 131,072 keys, a block at a time."""
    length = 131072
    pool = jax.random.normal(jax.random.key(0), (64, 64, 1, 576))
    table = (jnp.arange(length // 64, dtype=jnp.int32) % 64)[None]  # 32 times the same pages
    q_nope = jax.random.normal(jax.random.key(1), (1, 2, 2, 16))
    q_rope = jax.random.normal(jax.random.key(2), (1, 2, 2, 64))
    ends = jnp.full(1, length, jnp.int32), jnp.full(1, 2, jnp.int32), jnp.full((1, 2), -1)
    step = mla.prefill_step(CONFIG, table, *(x.astype(jnp.int32) for x in ends))
    out, lse = jax.jit(attend, static_argnums=1)(weights, CONFIG, q_nope, q_rope, pool, step)
    once = step._replace(block_table=table[:, :64], cache_seqlens=jnp.full(1, 4096, jnp.int32))
    expected, expected_lse = oracle(weights, Batch(pool, q_nope, q_rope, once), 0)
    # The last query sees each page 32 times: the same mean, 32 times the weight.
    np.testing.assert_allclose(out[0, -1], expected[-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(lse[0, -1], expected_lse[-1] + np.log(32), rtol=1e-5)


def test_memory_grows_with_queries_but_not_with_their_product_with_keys(
    weights: mla.MLAWeights,
) -> None:
    """A chunk of 4,096 queries over 131,072 keys would have 4.3 GB of logits."""

    def temporary(s_q: int, length: int) -> int:
        described = jax.ShapeDtypeStruct
        step = mla.Step(
            described((1, length // 64), jnp.int32),
            described((1,), jnp.int32),
            described((1,), jnp.int32),
            described((1, s_q), jnp.int32),
            described((1, s_q, 32), jnp.float32),
            described((1, s_q, 32), jnp.float32),
            None,
        )
        shapes = (1, s_q, 2, 16), (1, s_q, 2, 64), (length // 64, 64, 1, 576)
        arrays = [described(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(attend, static_argnums=1).lower(weights, CONFIG, *arrays, step)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, long, wide = temporary(512, 8192), temporary(512, 131072), temporary(4096, 131072)
    assert long < small + 2**20
    accumulators = 2 * (16 + 64 + 24 + 2) * 4  # per query: q, weighted values, maximum, sum
    assert wide < long + 6 * accumulators * 4096


def test_chunks_give_what_one_prefill_gives(weights: mla.MLAWeights) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 150, HF["hidden_size"]))
    table = jnp.array([[2, 0, 1]], jnp.int32)
    at = jnp.arange(150, dtype=jnp.int32)
    slots = (table[0, at // 64] * 64 + at % 64)[None]

    def run(*ends: int) -> tuple[np.ndarray, jax.Array]:
        pool, parts = cache.make_pool(1, 3, dtype=jnp.float32), []
        for begin, end in zip((0, *ends), ends, strict=False):
            lengths = jnp.array([end], jnp.int32), jnp.array([end - begin], jnp.int32)
            step = mla.prefill_step(CONFIG, table, *lengths, slots[:, begin:end])
            y, pool = prefill(weights, CONFIG, x[:, begin:end], pool, step)
            parts.append(y)
        return np.concatenate(parts, axis=1), pool

    whole, pool = run(150)
    chunked, chunked_pool = run(1, 64, 70, 150)
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chunked_pool, pool, rtol=1e-4, atol=1e-5)


def test_prefill_of_one_token_is_a_decode_step(weights: mla.MLAWeights) -> None:
    pool = jax.random.normal(jax.random.key(0), (3, 64, 1, 576))
    x = jax.random.normal(jax.random.key(1), (1, 1, HF["hidden_size"]))
    table = jnp.array([[2, 0, 1]], jnp.int32)
    one, lengths, slots = (jnp.array(x, jnp.int32) for x in ([1], [70], [[0 * 64 + 5]]))
    step = mla.prefill_step(CONFIG, table, lengths, one, slots)
    y, new_pool = prefill(weights, CONFIG, x, pool, step)
    step = mla.decode_step(CONFIG, table, lengths, slots)
    decode = jax.jit(mla.decode, static_argnums=1)
    expected, expected_pool = decode(weights, CONFIG, x, pool, step)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_pool, expected_pool, rtol=1e-5, atol=1e-6)


def test_positions_are_aligned_to_the_end() -> None:
    lengths, new = jnp.array([70, 5], jnp.int32), jnp.array([3, 5], jnp.int32)
    got = steps.positions(lengths, new, 5)
    assert got[0, :3].tolist() == [67, 68, 69]
    assert got[1].tolist() == [0, 1, 2, 3, 4]
