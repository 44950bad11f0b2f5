"""The absorbed MLA layer: projections, append, decode, projections back.

A head's logit is `q_nope . (W_UK c) + q_rope . k_rope` for a token's latent c and rotary key. With
W_UK moved to the other side, `(W_UK^T q_nope) . c`, all heads attend to the same cached row
(c, k_rope): one KV head, whose latent is also the value, and W_UV maps each head's result back.
That is the absorption of DeepSeek-V2 (arXiv:2405.04434, 2.1.2); README.md in this folder is its
page.
"""

import jax
import jax.numpy as jnp

from jax_flashmla import _shapes, cache
from jax_flashmla._api import mla_decode
from jax_flashmla._dispatch import Implementation
from jax_flashmla._norm import rms_norm
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.step import Step
from jax_flashmla.mla.weights import MLAWeights
from jax_flashmla.rope import rotate


def decode(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one layer on the newest s_q tokens of each request.

    In five lines::

        q_nope, q_rope, low = project(weights, config, x, step.cos, step.sin)
        pool = append_projected(pool, low, step.slots, ...)    # norms the latent, rotates the key
        q_latent = jnp.einsum("bshn,hnc->bshc", q_nope, weights.key_up)
        out, _ = mla_decode(q_latent, q_rope, pool, ..., softmax_scale=config.softmax_scale)
        y = jnp.einsum("bshc,hcv->bshv", out, weights.value_up), then the output projection

    A single row goes through the projections twice, see `_at_least_two_rows`.

    Args:
        weights: of the layer.
        config: of the model.
        x: normalised hidden states `[b, s_q, hidden]`, in the dtype of weights and pool. Rows that
            pad the batch may hold anything.
        pool: page pool `[num_pages, 64, 1, 576]`; donate it to the outermost `jax.jit`.
        step: from `decode_step`, for a flat pool `step.at_layer(layer, num_pages)`.
        implementation: as in `mla_decode`, for append and attention.

    Returns:
        `[b, s_q, hidden]` to add to the residual stream, 0 (or the output's bias) on rows of length
        0, and the pool with the new tokens.

    Raises:
        ValueError: a shape is wrong, or the step comes from `prefill_step`.
        TypeError: a dtype is wrong.
    """
    if step.schedule is None:
        raise ValueError("step: got one without a schedule, expected that of decode_step")
    q_nope, q_rope, pool = project_and_append(
        weights, config, x, pool, step, implementation=implementation
    )
    out, _ = mla_decode(
        absorb(weights, q_nope),
        q_rope,
        pool,
        step.block_table,
        step.cache_seqlens,
        softmax_scale=config.softmax_scale,
        schedule=step.schedule,
        implementation=implementation,
    )
    return project_back(weights, out), pool


def project_and_append(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects x to queries and cached rows, and writes the rows into the pool.

    Returns:
        q_nope `[b, s_q, h_q, qk_nope_head_dim]`, rotated q_rope `[b, s_q, h_q, 64]`, the pool.
    """
    _check(weights, config, x, pool, step)
    batch = x.shape[0]
    rows = (_at_least_two_rows(array) for array in (x, step.cos, step.sin))
    q_nope, q_rope, low = project(weights, config, *rows)
    pool = cache.append_projected(
        pool,
        low[:batch].reshape(-1, low.shape[-1]),
        step.slots.reshape(-1),
        latent_norm=weights.latent_norm,
        norm_eps=config.latent_norm_eps,
        cos=step.cos.reshape(-1, step.cos.shape[-1]),
        sin=step.sin.reshape(-1, step.sin.shape[-1]),
        rope_interleave=config.rope_interleave,
        implementation=implementation,
    )
    return q_nope[:batch], q_rope[:batch], pool


def project(
    weights: MLAWeights, config: MLAConfig, x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects hidden states to queries and down to what is cached.

    Args:
        weights: of the layer.
        config: of the model.
        x: `[b, s_q, hidden]`.
        cos: float32 `[b, s_q, 32]`.
        sin: float32 `[b, s_q, 32]`.

    Returns:
        q_nope `[b, s_q, h_q, qk_nope_head_dim]`, q_rope `[b, s_q, h_q, 64]` rotated, and
        `[b, s_q, q_lora_rank + 576]`, whose last columns are latent and key as they come: the
        append norms and rotates them.
    """
    low = x @ weights.down
    if weights.down_bias is not None:
        low += weights.down_bias.reshape(1, 1, -1)
    rank = config.q_lora_rank or 0
    if weights.query_norm is not None:
        x = rms_norm(low[..., :rank], weights.query_norm, config.latent_norm_eps)
    q = jnp.einsum("bsr,rhd->bshd", x, weights.query_up)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    by_head = cos[..., None, :], sin[..., None, :]
    q_rope = rotate(q_rope, *by_head, interleave=config.rope_interleave)
    return q_nope, q_rope, low


def absorb(weights: MLAWeights, q_nope: jax.Array) -> jax.Array:
    """Applies W_UK to the queries: `[b, s_q, h_q, qk_nope_head_dim]` to `[b, s_q, h_q, 512]`."""
    rows = _at_least_two_rows(q_nope)
    return jnp.einsum("bshn,hnc->bshc", rows, weights.key_up)[: q_nope.shape[0]]


def project_back(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Maps the results of attention `[b, s_q, h_q, 512]` back to `[b, s_q, hidden]`."""
    return project_out(weights, unabsorb(weights, _at_least_two_rows(out)))[: out.shape[0]]


def unabsorb(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Applies W_UV to the results: `[b, s_q, h_q, 512]` to `[b, s_q, h_q, v_head_dim]`."""
    return jnp.einsum("bshc,hcv->bshv", out, weights.value_up)


def project_out(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Maps the heads' results `[b, s_q, h_q, v_head_dim]` back to `[b, s_q, hidden]`."""
    y = jnp.einsum("bshv,hvd->bsd", out, weights.output)
    return y if weights.output_bias is None else y + weights.output_bias.reshape(1, 1, -1)


def _at_least_two_rows(x: jax.Array) -> jax.Array:
    """Repeats a single row: `[1, 1, ...]` becomes `[2, 1, ...]`; more rows stay as they are.

    XLA does not take the product of one row and a few million weights for a matrix product: it
    writes the weights times the row to memory, rounded, and sums that up. In V2-Lite's shapes on an
    H200 a layer at batch 1 took 67 us that way and takes 37 with two rows (JAX 0.11.2).
    """
    return jnp.broadcast_to(x, (2, *x.shape[1:])) if x.shape[:2] == (1, 1) else x


def _check(
    weights: MLAWeights, config: MLAConfig, x: jax.Array, pool: jax.Array, step: Step
) -> None:
    """Checks what the operations called below would name in words of their own."""
    _shapes.check_shape("x", x, (*step.slots.shape, config.hidden_size))
    _shapes.check_float("x", x)
    _shapes.check_dtype("pool", pool, x.dtype)
    for name, array in weights._asdict().items():
        if array is not None:
            _shapes.check_dtype(f"weights.{name}", array, x.dtype)
    rank, hidden = config.q_lora_rank or 0, config.hidden_size
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    nope, v_dim = config.qk_nope_head_dim, config.v_head_dim
    # The heads may be fewer than the config's: a device's share.
    for name, dims in (
        ("down", (hidden, rank + cached)),
        ("query_up", (rank or hidden, "h_q", config.qk_head_dim)),
        ("key_up", ("h_q", nope, config.kv_lora_rank)),
        ("value_up", ("h_q", config.kv_lora_rank, v_dim)),
        ("output", ("h_q", v_dim, hidden)),
    ):
        _shapes.check_shape(f"weights.{name}", getattr(weights, name), dims)
