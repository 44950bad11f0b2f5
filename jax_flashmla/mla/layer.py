"""The absorbed MLA layer: projections, append, decode, projections back.

A head's logit is `q_nope . (W_UK c) + q_rope . k_rope` for a token's latent c and rotary key. With
W_UK moved to the other side, `(W_UK^T q_nope) . c`, all heads attend to the same cached row
(c, k_rope): one KV head, whose latent is also the value, and W_UV maps each head's result back.
That is the absorption of DeepSeek-V2 (arXiv:2405.04434, 2.1.2); README.md in this folder is its
page.
"""

import jax
import jax.numpy as jnp

from jax_flashmla import _queries, _shapes, cache
from jax_flashmla._absorbed_attention import Operands, Static, absorbed_attention
from jax_flashmla._api import mla_decode
from jax_flashmla._dispatch import Implementation
from jax_flashmla._norm import rms_norm
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.step import Step
from jax_flashmla.mla.weights import MLAWeights


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

        low = x @ weights.down
        pool = append_projected(pool, low, step.slots, ...)    # norms the latent, rotates the key
        q = absorbed_queries(low[..., :q_lora_rank], weights.query_up, weights.key_up, ...)
        out, _ = mla_decode(*q, pool, ..., softmax_scale=config.softmax_scale)
        y = jnp.einsum("bshc,hcv->bshv", out, weights.value_up), then the output projection

    where the low-rank form is normed first and, in models without it, x takes its place. A single
    row goes through XLA's products twice, see `_queries.at_least_two_rows`.

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
    _check(weights, config, x, pool, step)
    has_bias_between = weights.down_bias is not None and weights.query_norm is None
    attend = _attend_in_steps if has_bias_between else _attend
    out, pool = attend(weights, config, x, pool, step, implementation)
    return project_back(weights, out), pool


def _attend(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """The heads' results `[b, s_q, h_q, 512]`, in one call wherever that has a kernel."""
    low_rank = weights.query_norm is not None
    operands = Operands(
        source=_down(weights, x) if low_rank else x,
        query_up=weights.query_up,
        key_up=weights.key_up,
        side=weights.query_norm if low_rank else weights.down,
        latent_norm=weights.latent_norm,
        cos=step.cos,
        sin=step.sin,
        slots=step.slots,
        kv_cache=pool,
        block_table=step.block_table,
        cache_seqlens=step.cache_seqlens,
        tile_scheduler_metadata=step.schedule.tile_scheduler_metadata,
        num_splits=step.schedule.num_splits,
    )
    return absorbed_attention(
        operands,
        Static(
            config.softmax_scale, config.latent_norm_eps, config.rope_interleave, implementation
        ),
    )


def _attend_in_steps(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    q_latent, q_rope, pool = absorbed_and_append(
        weights, config, x, pool, step, implementation=implementation
    )
    out, _ = mla_decode(
        q_latent,
        q_rope,
        pool,
        step.block_table,
        step.cache_seqlens,
        softmax_scale=config.softmax_scale,
        schedule=step.schedule,
        implementation=implementation,
    )
    return out, pool


def absorbed_and_append(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects x to absorbed queries and cached rows, and writes the rows into the pool.

    Returns:
        q_latent `[b, s_q, h_q, 512]`, rotated q_rope `[b, s_q, h_q, 64]`, the pool.
    """
    _check(weights, config, x, pool, step)
    static = {
        "interleave": config.rope_interleave,
        "implementation": "xla" if implementation == "xla" else None,  # some shapes have no kernel
    }
    queries = weights.query_up, weights.key_up, step.cos, step.sin
    if weights.query_norm is None:  # one kernel reads x for all
        *q, low = _queries.absorbed_queries((x, *queries, weights.down), **static)
        low = _with_bias(low, weights.down_bias)
    else:
        low = _down(weights, x)[: x.shape[0]]
        q = _queries.absorbed_queries((_low_rank(weights, config, low), *queries), **static)
    return *q, _append(weights, config, low, pool, step, implementation)


def project_and_append(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: Step,
    *,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same with queries as they are before W_UK.

    Returns:
        q_nope `[b, s_q, h_q, qk_nope_head_dim]`, rotated q_rope `[b, s_q, h_q, 64]`, the pool.
    """
    _check(weights, config, x, pool, step)
    low = _down(weights, x)[: x.shape[0]]
    source = x if weights.query_norm is None else _low_rank(weights, config, low)
    q_nope, q_rope = _queries.project(
        source, weights.query_up, step.cos, step.sin, interleave=config.rope_interleave
    )
    return q_nope, q_rope, _append(weights, config, low, pool, step, implementation)


def _down(weights: MLAWeights, x: jax.Array) -> jax.Array:
    """Projects x down; a single row comes twice."""
    return _with_bias(_queries.at_least_two_rows(x) @ weights.down, weights.down_bias)


def _with_bias(low: jax.Array, bias: jax.Array | None) -> jax.Array:
    return low if bias is None else low + bias.reshape(1, 1, -1)


def _low_rank(weights: MLAWeights, config: MLAConfig, low: jax.Array) -> jax.Array:
    """The normed low-rank form that queries are projected from."""
    rank = weights.query_norm.shape[0]
    return rms_norm(low[..., :rank], weights.query_norm, config.latent_norm_eps)


def _append(
    weights: MLAWeights,
    config: MLAConfig,
    low: jax.Array,
    pool: jax.Array,
    step: Step,
    implementation: Implementation,
) -> jax.Array:
    return cache.append_projected(
        pool,
        low.reshape(-1, low.shape[-1]),
        step.slots.reshape(-1),
        latent_norm=weights.latent_norm,
        norm_eps=config.latent_norm_eps,
        cos=step.cos.reshape(-1, step.cos.shape[-1]),
        sin=step.sin.reshape(-1, step.sin.shape[-1]),
        rope_interleave=config.rope_interleave,
        implementation=implementation,
    )


def project_back(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Maps the results of attention `[b, s_q, h_q, 512]` back to `[b, s_q, hidden]`."""
    return project_out(weights, unabsorb(weights, _queries.at_least_two_rows(out)))[: out.shape[0]]


def unabsorb(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Applies W_UV to the results: `[b, s_q, h_q, 512]` to `[b, s_q, h_q, v_head_dim]`."""
    return jnp.einsum("bshc,hcv->bshv", out, weights.value_up)


def project_out(weights: MLAWeights, out: jax.Array) -> jax.Array:
    """Maps the heads' results `[b, s_q, h_q, v_head_dim]` back to `[b, s_q, hidden]`."""
    y = jnp.einsum("bshv,hvd->bsd", out, weights.output)
    return y if weights.output_bias is None else y + weights.output_bias.reshape(1, 1, -1)


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
