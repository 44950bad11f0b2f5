"""Layers, and steps of ragged batches, for the tests of the attention in one call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import mla

DIMS = {"qk_nope_head_dim": 128, "v_head_dim": 128}
SMALL = {
    "low rank": mla.MLAConfig(256, num_attention_heads=4, q_lora_rank=128, **DIMS),
    "no low rank": mla.MLAConfig(192, num_attention_heads=3, **DIMS, rope_interleave=False),
}


class Problem(NamedTuple):
    """What `mla.decode` takes, in its order but for the config."""

    weights: mla.MLAWeights
    x: jax.Array
    pool: jax.Array
    step: mla.Step


def random_weights(
    config: mla.MLAConfig, dtype: str = "float32", *, seed: int = 0, bias: bool = False
) -> mla.MLAWeights:
    """Weights that keep the size of what they multiply; norms are near 1."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def normal(contracted: int, *shape: int, around: float = 0.0) -> jax.Array:
        values = around + contracted**-0.5 * jax.random.normal(next(keys), shape)
        return values.astype(jnp.dtype(dtype))

    columns = (rank or 0) + 576
    return mla.MLAWeights(
        down=normal(hidden, hidden, columns),
        down_bias=normal(4, columns) if bias else None,
        query_norm=normal(11, rank, around=1.0) if rank else None,
        query_up=normal(rank or hidden, rank or hidden, heads, nope + 64),
        latent_norm=normal(11, 512, around=1.0),
        key_up=normal(nope, heads, nope, 512),
        value_up=normal(512, heads, 512, v_dim),
        output=normal(heads * v_dim, heads, v_dim, hidden),
        output_bias=None,
    )


def place(lengths: list[int], s_q: int, pages: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Table, lengths and slots, each request on shuffled pages of its own.

    New tokens that a request is too short for have slots of -1.
    """
    width = max(1, -(-max(lengths) // 64))
    table = np.full((len(lengths), width), -1, np.int32)
    slots = np.full((len(lengths), s_q), -1, np.int32)
    free = iter(np.random.default_rng(0).permutation(pages))
    for row, length in enumerate(lengths):
        for column in range(-(-length // 64)):
            table[row, column] = next(free)
        for j in range(max(0, s_q - length), s_q):
            page, offset = divmod(length - s_q + j, 64)
            slots[row, j] = table[row, page] * 64 + offset
    return tuple(map(jnp.asarray, (table, np.int32(lengths), slots)))


def problem(
    config: mla.MLAConfig,
    lengths: list[int],
    *,
    s_q: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    bias: bool = False,
    weights: mla.MLAWeights | None = None,
) -> Problem:
    """Hidden states of all requests and a pool that is full of values.

    Weights are drawn by the seed as well, unless they are given.
    """
    pages = sum(-(-length // 64) for length in lengths) + 2
    keys = jax.random.split(jax.random.key(seed + 100))
    x = jax.random.normal(keys[0], (len(lengths), s_q, config.hidden_size))
    pool = jax.random.normal(keys[1], (pages, 64, 1, 576))
    return Problem(
        weights or random_weights(config, dtype, seed=seed, bias=bias),
        x.astype(jnp.dtype(dtype)),
        pool.astype(jnp.dtype(dtype)),
        mla.decode_step(config, *place(lengths, s_q, pages)),
    )


def ragged(batch: int) -> list[int]:
    """Short lengths, among them none, one, and whole pages."""
    return np.resize([70, 0, 1, 64, 129, 2, 65, 200, 128, 33], batch).tolist()
