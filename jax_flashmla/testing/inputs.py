"""The device half of a case's data: queries and the page pool, poisoned where nothing may read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.testing import batches, cases, logits

# Signs of the direction in the RoPE part along which boosts are written, [1, 1, 1, 64].
PATTERN = np.where(np.arange(cases.ROPE_DIM) % 3 == 0, -1.0, 1.0).astype(np.float32)
PATTERN = PATTERN.reshape(1, 1, 1, -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_latent", "q_rope", "kv_cache", "block_table", "cache_seqlens"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The five array arguments of `mla_decode`, in its order.

    Attributes:
        q_latent: [batch, s_q, h_q, 512].
        q_rope: [batch, s_q, h_q, 64].
        kv_cache: [pool_pages, 64, h_kv, 576]; NaN in every slot that no request reads.
        block_table: int32 [batch, pages].
        cache_seqlens: int32 [batch].
    """

    q_latent: jax.Array
    q_rope: jax.Array
    kv_cache: jax.Array
    block_table: jax.Array
    cache_seqlens: jax.Array

    def arrays(self) -> tuple[jax.Array, ...]:
        """The positional arguments of `mla_decode`."""
        return self.q_latent, self.q_rope, self.kv_cache, self.block_table, self.cache_seqlens


def make_inputs(case: cases.Case) -> Inputs:
    """The inputs of a case; the same case always gives the same bits on one kind of device."""
    batch = batches.make_batch(case)
    shape = case.shape
    q_latent, q_rope = _queries(shape, case.logits, jax.random.key(case.seed))
    return Inputs(
        q_latent,
        q_rope,
        make_pool(shape, case.logits, batch, case.seed),
        jnp.asarray(batch.block_table),
        jnp.asarray(batch.cache_seqlens),
    )


def make_pool(shape: cases.Shape, recipe: str, batch: batches.Batch, seed: int) -> jax.Array:
    """The page pool of a batch, NaN wherever no request attends.

    The noise of one pool shape is drawn once and shared by all cases: their tables differ.
    """
    how = logits.RECIPES[recipe]
    rng = np.random.default_rng([seed, 1])
    boost = np.zeros(batch.position.shape)
    if how.boost is not None:
        boost = how.boost(batch.position, int(batch.cache_seqlens.max(initial=0)), rng)
    along = boost / (cases.ROPE_DIM * logits.BOOST_QUERY * shape.softmax_scale)
    noise = _noise((shape.pool_pages, cases.PAGE_SIZE, shape.h_kv, cases.HEAD_DIM_QK), shape.dtype)
    slots = np.where(batch.readable, along, np.nan).astype(np.float32)
    return _fill(noise, np.float32(how.k_rope), slots)


@functools.lru_cache(maxsize=4)
def _noise(pool: tuple[int, ...], dtype: str) -> jax.Array:
    draw = jax.jit(lambda key: jax.random.normal(key, pool, jnp.dtype(dtype)))
    return draw(jax.random.key(0))


@jax.jit
def _fill(noise: jax.Array, k_rope: jax.Array, slots: jax.Array) -> jax.Array:
    """Noise [pages, 64, h_kv, 576] scaled and boosted; NaN in `slots` [pages, 64] poisons a key."""
    latent, rope = jnp.split(noise.astype(jnp.float32), [cases.HEAD_DIM_V], axis=-1)
    slots = slots[:, :, None, None]
    poison = slots * np.float32(0)  # NaN stays NaN
    rope = rope * k_rope + slots * PATTERN
    latent = latent * np.float32(logits.KEY_SIGMA) + poison
    return jnp.concatenate([latent, rope], axis=-1).astype(noise.dtype)


def _queries(shape: cases.Shape, recipe: str, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    how = logits.RECIPES[recipe]
    boosted = np.float32(logits.BOOST_QUERY if how.boost is not None else 0.0)
    sigmas = np.float32(how.q_latent), np.float32(how.q_rope)
    dims = (shape.batch, shape.s_q, shape.h_q)
    return _draw_queries(dims, shape.dtype, key, *sigmas, boosted)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw_queries(
    dims: tuple[int, int, int],
    dtype: str,
    key: jax.Array,
    latent: jax.Array,
    rope: jax.Array,
    boosted: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    noise = jax.random.normal(key, (*dims, cases.HEAD_DIM_QK), jnp.float32)
    # float16 ends at 65504; the widest recipe reaches it at 4.5 sigma.
    limit = np.float32(6e4)
    q_latent = jnp.clip(noise[..., : cases.HEAD_DIM_V] * latent, -limit, limit)
    q_rope = noise[..., cases.HEAD_DIM_V :] * rope + boosted * PATTERN
    return q_latent.astype(dtype), q_rope.astype(dtype)
