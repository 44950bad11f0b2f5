"""The public functions: argument checks, defaults, and FlashMLA's conventions."""

import jax
import jax.numpy as jnp

from jax_flashmla import _dispatch, _primitives, _shapes
from jax_flashmla._dispatch import Implementation
from jax_flashmla.schedule import Schedule, default_num_sm_parts


def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_heads_per_head_k: int,
    num_heads_k: int,
    *,
    num_sm_parts: int | None = None,
) -> Schedule:
    """Divides the cached pages of a batch among the parts of the GPU, on the device.

    Call it once per decode step and give the result to all layers; it works inside `jax.jit`.
    `jax_flashmla.schedule` says what the numbers mean. Name and arguments are FlashMLA's. Over a
    mesh it is the schedule of the whole batch: lengths that are sharded are gathered.

    Args:
        cache_seqlens: int32 `[b]`, cached tokens per request.
        num_heads_per_head_k: packed query rows per request and KV head, s_q * h_q // h_kv.
        num_heads_k: KV heads, h_kv.
        num_sm_parts: parts to divide the work among, at least 1. By default as many as fill the
            local GPU with `num_heads_k * ceil(num_heads_per_head_k / 64)` CTAs each; 132 SMs are
            assumed where no GPU is visible. Every value gives correct results.

    Returns:
        A named tuple of `tile_scheduler_metadata`, int32
        `[num_sm_parts, TileSchedulerMetaDataSize]`, and `num_splits`, int32 `[b + 1]`, the running
        total of the splits of each request.

    Raises:
        ValueError: a shape or count is wrong.
        TypeError: a dtype is wrong, or a static argument is traced.
    """
    (cache_seqlens,) = _shapes.as_arrays(cache_seqlens=cache_seqlens)
    _shapes.check_seqlens(cache_seqlens)
    rows = _shapes.check_count("num_heads_per_head_k", num_heads_per_head_k)
    h_kv = _shapes.check_count("num_heads_k", num_heads_k)
    parts = _num_sm_parts(num_sm_parts, rows, h_kv)
    return _primitives.schedule(cache_seqlens, num_sm_parts=parts, implementation=None)


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | None,
    num_splits: jax.Array | None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Decodes one step with FlashMLA's arguments and conventions.

    It is `mla_decode` with the queries in one array, a default scale, and the log-sum-exp in
    FlashMLA's layout, +inf on rows that see no key.

    Args:
        q: `[b, s_q, h_q, 576]`, bfloat16, float16 or float32.
        k_cache: page pool `[num_pages, 64, h_kv, 576]` of the same dtype; values are its first 512
            columns.
        block_table: int32 `[b, max_pages_per_seq]`, the pages of each request.
        cache_seqlens: int32 `[b]`, cached tokens per request.
        head_dim_v: 512.
        tile_scheduler_metadata: from `get_mla_metadata`, or None to schedule here.
        num_splits: from `get_mla_metadata`, or None to schedule here.
        softmax_scale: factor of the logits, a Python or NumPy number. None means 576 ** -0.5, which
            is not what DeepSeek models need: see `mla_decode`.
        causal: query j sees the keys `k < seqlen - (s_q - 1 - j)`, else `k < seqlen`.

    Returns:
        out `[b, s_q, h_q, 512]` of q's dtype, 0 on empty rows, and softmax_lse float32
        `[b, h_q, s_q]`, the natural logarithm, +inf on empty rows.

    Raises:
        ValueError: a shape or value is wrong.
        TypeError: a dtype is wrong, or a static argument is traced.
    """
    arrays = _shapes.as_arrays(
        q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens
    )
    _shapes.check_head_dim_v(head_dim_v)
    shape = _shapes.joined_decode_shape(*arrays)
    given = _pair(tile_scheduler_metadata, num_splits)
    given, parts = _checked_parts(given, None, shape)
    scale = _shapes.HEAD_DIM_QK**-0.5 if softmax_scale is None else softmax_scale
    out, lse = _primitives.decode(
        (arrays[0], *arrays),  # the joined queries, in the place of both parts
        given,
        num_sm_parts=parts,
        softmax_scale=_shapes.check_positive("softmax_scale", scale),
        causal=_shapes.check_flag("causal", causal),
        implementation=None,
    )
    return out, jnp.where(lse == -jnp.inf, jnp.inf, lse).transpose(0, 2, 1)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    schedule: Schedule | None = None,
    num_sm_parts: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Decodes one step of multi-head latent attention over a paged KV cache.

    In five lines, for one KV head, request r and all the lengths full::

        q = jnp.concatenate([q_latent[r], q_rope[r]], axis=-1)           # [s_q, h_q, 576]
        keys = kv_cache[block_table[r], :, 0].reshape(-1, 576)           # [tokens, 576]
        logits = jnp.einsum("qhd,kd->qhk", q, keys) * softmax_scale
        out = jnp.einsum("qhk,kd->qhd", jax.nn.softmax(logits), keys[:, :512])
        lse = jax.nn.logsumexp(logits, axis=-1)

    Tokens at and after `cache_seqlens`, the pages that hold only such tokens and the table entries
    that name them are never used, whatever they hold. Lengths below 0 count as 0, lengths beyond
    the table as the table's. A table entry inside the length that is out of range gives zeros or
    garbage for its own request. The same page may serve several requests.

    Over a mesh the batch and the query heads may be sharded, with several KV heads these as the
    query heads; each device makes its own schedule if the batch is. The pool is whole on every
    device, or its pages are sharded as the batch is: then the table names pages of its device.

    Args:
        q_latent: absorbed queries `[b, s_q, h_q, 512]`, bfloat16, float16 or float32.
        q_rope: rotated part of the queries `[b, s_q, h_q, 64]` of the same dtype.
        kv_cache: page pool `[num_pages, 64, h_kv, 576]` of the same dtype: the latent, which is
            also the value, then the rotated key. h_kv divides h_q.
        block_table: int32 `[b, max_pages_per_seq]`, the pages of each request.
        cache_seqlens: int32 `[b]`, cached tokens per request.
        softmax_scale: factor of the logits, a finite positive Python or NumPy number. DeepSeek
            models need `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * mscale ** 2`, not
            576 ** -0.5.
        causal: query j sees the keys `k < seqlen - (s_q - 1 - j)`, else `k < seqlen`. With one
            query it changes nothing.
        schedule: result of `get_mla_metadata` for these lengths, to share it between layers. A
            schedule made for others of the same batch gives wrong numbers, never a fault. None
            schedules here.
        num_sm_parts: parts to divide the work among when scheduling here.
        implementation: "cuda" for the kernel or an error that says why it cannot run, "xla" for
            the portable lowering, None for the kernel wherever it can run. float32 has no kernel.

    Returns:
        out `[b, s_q, h_q, 512]` of q_latent's dtype, 0 on rows that see no key, and lse float32
        `[b, s_q, h_q]`, the natural log-sum-exp of the scaled logits, -inf on those rows.

    Raises:
        ValueError: a shape, value or sharding is wrong; a sharding over Auto axes is refused by a
            JaxRuntimeError when the program is compiled.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    arrays = _shapes.as_arrays(
        q_latent=q_latent,
        q_rope=q_rope,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
    )
    shape = _shapes.split_decode_shape(*arrays)
    _dispatch.check_request(implementation, _dispatch.dtype_refusal(arrays[0].dtype))
    given, parts = _checked_parts(schedule, num_sm_parts, shape)
    return _primitives.decode(
        arrays,
        given,
        num_sm_parts=parts,
        softmax_scale=_shapes.check_positive("softmax_scale", softmax_scale),
        causal=_shapes.check_flag("causal", causal),
        implementation=implementation,
    )


def _checked_parts(
    given: tuple[jax.Array, jax.Array] | None,
    num_sm_parts: int | None,
    shape: _shapes.DecodeShape,
) -> tuple[Schedule | None, int | None]:
    """Checks the schedule that was given, if any, and returns it with the number of parts."""
    if given is None:
        parts = num_sm_parts
        return None, None if parts is None else _shapes.check_count("num_sm_parts", parts)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        got = type(given).__name__
        raise TypeError(f"schedule: got {got}, expected the pair that get_mla_metadata returns")
    pair = _shapes.as_arrays(tile_scheduler_metadata=given[0], num_splits=given[1])
    return Schedule(*pair), _shapes.check_schedule(*pair, shape.batch, num_sm_parts)


def _pair(
    tile_scheduler_metadata: jax.Array | None, num_splits: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    if (tile_scheduler_metadata is None) != (num_splits is None):
        raise ValueError(
            "tile_scheduler_metadata, num_splits: got one of them, expected both or None for both"
        )
    return None if num_splits is None else (tile_scheduler_metadata, num_splits)


def _num_sm_parts(given: int | None, num_heads_per_head_k: int, num_heads_k: int) -> int:
    if given is None:
        return default_num_sm_parts(num_heads_per_head_k, num_heads_k)
    return _shapes.check_count("num_sm_parts", given)
