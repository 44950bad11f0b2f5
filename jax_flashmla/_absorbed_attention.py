"""The attention of a layer as one operation: absorbed queries, append and decode.

It computes nothing that the three do not, which stand in its place wherever it has no kernel. As
one call their kernels begin while the one ahead ends, also inside the CUDA graphs that XLA makes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jax_flashmla import (
    _cache_primitives,
    _cache_shapes,
    _dispatch,
    _ffi,
    _manual_axes,
    _mesh,
    _norm,
    _operation,
    _primitives,
    _queries,
    _shapes,
)
from jax_flashmla._dims import Dims
from jax_flashmla._dispatch import Implementation
from jax_flashmla._operation import Arrays
from jax_flashmla.schedule import Schedule

MOST_RANK = 4096  # columns of a row that the kernel norms

absorbed_attention_p = Primitive("flashmla_absorbed_attention")


class Operands(NamedTuple):
    """What it takes.

    Attributes:
        source: `[b, s_q, width]`, or in low rank what the projection down gave, with the cached
            columns, `[at least b, s_q, rank + 576]`.
        query_up: `[width or rank, h_q, qk_nope_head_dim + 64]`.
        key_up: `[h_q, qk_nope_head_dim, 512]`.
        side: down `[width, 576]`, or in low rank the norm's weights `[rank]`.
        latent_norm: `[512]`.
        cos: float32 `[b, s_q, 32]`.
        sin: float32 `[b, s_q, 32]`.
        slots: int32 `[b, s_q]`.
        kv_cache: `[num_pages, 64, 1, 576]`.
        block_table: int32 `[b, max_pages_per_seq]`.
        cache_seqlens: int32 `[b]`.
        tile_scheduler_metadata: int32 `[parts, 8]`.
        num_splits: int32 `[b + 1]`.
    """

    source: jax.Array
    query_up: jax.Array
    key_up: jax.Array
    side: jax.Array
    latent_norm: jax.Array
    cos: jax.Array
    sin: jax.Array
    slots: jax.Array
    kv_cache: jax.Array
    block_table: jax.Array
    cache_seqlens: jax.Array
    tile_scheduler_metadata: jax.Array
    num_splits: jax.Array

    @property
    def low_rank(self) -> bool:
        """Whether the source has been projected down."""
        return len(self.side.shape) == 1

    @property
    def projected_shape(self) -> tuple[int, int, int]:
        """Of what queries are projected from."""
        return (*self.slots.shape, self.query_up.shape[0])


class Static(NamedTuple):
    """What it takes besides.

    Attributes:
        softmax_scale: factor of the logits.
        norm_eps: of both norms.
        interleave: whether rotary columns hold pairs side by side.
        implementation: as in `mla_decode`.
    """

    softmax_scale: float
    norm_eps: float
    interleave: bool
    implementation: Implementation


def absorbed_attention(operands: Operands, static: Static) -> tuple[jax.Array, jax.Array]:
    """Attends, where the layer has checked the weights.

    Returns:
        The heads' results `[b, s_q, h_q, 512]`, and the cache with the new rows.

    Raises:
        ValueError: a shape or sharding is wrong.
        TypeError: a dtype is wrong.
    """
    _check(operands, static)
    sizes = *operands.slots.shape, *operands.key_up.shape, *operands.block_table.shape
    if 0 in (*sizes, operands.kv_cache.shape[0]):
        return _separate(operands, static)
    out, cache = _function(static)(*operands)
    return out, cache


def _compose(
    operands: Operands, static: Static, queries: Callable, append: Callable, decode: Callable
) -> tuple[jax.Array, jax.Array]:
    """The three operations in turn, given as functions of their arrays."""
    weights = operands.query_up, operands.key_up
    angles = operands.cos, operands.sin
    low = operands.source[: operands.slots.shape[0]]
    if operands.low_rank:
        x = _norm.rms_norm(low[..., : operands.side.shape[0]], operands.side, static.norm_eps)
        q_latent, q_rope = queries(x, *weights, *angles)
    else:
        q_latent, q_rope, low = queries(low, *weights, *angles, operands.side)
    low, cos, sin = (x.reshape(-1, x.shape[-1]) for x in (low, *angles))
    slots = operands.slots.reshape(-1)
    cache = append(operands.kv_cache, low, slots, operands.latent_norm, cos, sin)
    return decode(q_latent, q_rope, cache, *operands[-4:]), cache


def _separate(
    operands: Operands, static: Static, *, here: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The operations as their users call them, or `here`, on what a device has."""
    scale, eps, interleave, implementation = static
    rotated = {"interleave": interleave, "implementation": implementation}
    projected = {"interleave": interleave, "implementation": _of_queries(implementation)}
    attention = {"softmax_scale": scale, "causal": True, "implementation": implementation}

    def queries(*arrays: jax.Array) -> Arrays:
        project = _queries.project_here if here else _queries.absorbed_queries
        return project(arrays, **projected)

    def append(*arrays: jax.Array) -> jax.Array:
        if not here:
            return _cache_primitives.append_projected(arrays, **rotated, norm_eps=eps)
        primitive = _cache_primitives.append_projected_p
        return primitive.bind(*_manual_axes.align(arrays), **rotated, norm_eps=eps)[0]

    def decode(*arrays: jax.Array) -> jax.Array:
        if here:
            aligned = _manual_axes.align(arrays)
            return _primitives.decode_here(aligned, num_sm_parts=None, **attention)[0]
        schedule = Schedule(*arrays[5:])
        return _primitives.decode(arrays[:5], schedule, num_sm_parts=None, **attention)[0]

    return _compose(operands, static, queries, append, decode)


def _of_queries(implementation: Implementation) -> Implementation:
    """Their projection has no kernel for some shapes that the others have one for."""
    return "xla" if implementation == "xla" else None


@functools.cache
def _function(static: Static) -> Callable:
    def local(*arrays: jax.Array) -> Arrays:
        operands = Operands(*arrays)
        many = _queries.has_many_tokens(operands.slots)
        if many or static.implementation == "xla" or _refusal(*operands):
            return _separate(operands, static, here=True)
        schedule = _primitives.schedule_here(
            operands[-2:],
            operands.cache_seqlens,
            num_sm_parts=None,
            rows=operands.slots.shape[1] * operands.key_up.shape[0],
            h_kv=1,
            implementation=static.implementation,
        )
        aligned = _manual_axes.align([*operands[:-2], *schedule])
        # The cache does not depend on the heads' weights: where only these differ it is the same.
        same_over = _manual_axes.varying(aligned) - _manual_axes.varying(_of_the_cache(operands))
        return tuple(absorbed_attention_p.bind(*aligned, **static._asdict(), same_over=same_over))

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        operands = Operands(*arrays)
        repeated = operands.source.shape[0] != operands.slots.shape[0]
        dims = _dims_of(operands.low_rank, repeated)
        return list(_mesh.spread(local, dims, operands, align=False))

    @call.def_vmap
    def separate(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple:
        del axis_size
        axes = [0 if batched else None for batched in in_batched]
        results = jax.vmap(lambda *each: _separate(Operands(*each), static), axes)(*arrays)
        return list(results), [True, True]

    return _operation.inference_only("MLA attention", call)


def _of_the_cache(operands: Operands) -> list[jax.Array]:
    """What the new cache is made of."""
    made_of = [operands.source, operands.latent_norm, operands.cos, operands.sin, operands.slots]
    return [*made_of, operands.kv_cache, *(() if operands.low_rank else (operands.side,))]


# Over a mesh.


@functools.cache
def _dims_of(low_rank: bool, repeated: bool) -> Dims:
    """`repeated`: the source has a single row twice."""
    width = "rank" if low_rank else "width"
    source = f"{'rows' if repeated else 'batch'} queries {'low' if low_rank else 'width'}"
    return Dims(
        operands=(
            ("source", source),
            ("query_up", f"{width} heads head_dim"),
            ("key_up", "heads nope latent"),
            ("query_norm", "rank") if low_rank else ("down", "width down_columns"),
            ("latent_norm", "latent"),
            ("cos", "batch queries pairs"),
            ("sin", "batch queries pairs"),
            ("slots", "batch queries"),
            ("kv_cache", "pages slots kv_heads columns"),
            ("block_table", "batch table_width"),
            ("cache_seqlens", "batch"),
            ("tile_scheduler_metadata", "parts fields"),
            ("num_splits", "totals"),
        ),
        results=("batch queries heads latent", "pages slots kv_heads columns"),
        sharded=frozenset(["batch", "heads"]),
        follows=(("pages", "batch", False),),  # else the pools would become different
        gathered=frozenset(["width", "rank", "head_dim", "nope", "latent", "down_columns"]),
    )


# Abstract evaluation and lowerings.


def _check(operands: Operands, static: Static) -> None:
    shape = *operands.slots.shape, operands.query_up.shape[1]
    dtype = operands.source.dtype
    _cache_shapes.check_pool(operands.kv_cache, 1)
    _shapes.split_decode_shape(
        jax.ShapeDtypeStruct((*shape, _shapes.KV_LORA_RANK), dtype),
        jax.ShapeDtypeStruct((*shape, _shapes.ROPE_DIM), dtype),
        operands.kv_cache,
        operands.block_table,
        operands.cache_seqlens,
    )
    _shapes.check_schedule(*operands[-2:], shape[0], None)
    for name, array, wanted in (
        ("latent_norm", operands.latent_norm, (_shapes.KV_LORA_RANK,)),
        ("cos", operands.cos, (*shape[:2], _cache_shapes.ROPE_PAIRS)),
        ("sin", operands.sin, (*shape[:2], _cache_shapes.ROPE_PAIRS)),
        ("query_norm" if operands.low_rank else "down", operands.side, _side_shape(operands)),
    ):
        _shapes.check_shape(name, array, wanted)
    for name, array, wanted in (
        ("slots", operands.slots, jnp.int32),
        ("cos", operands.cos, jnp.float32),
        ("sin", operands.sin, jnp.float32),
    ):
        _shapes.check_dtype(name, array, wanted)
    _dispatch.check_request(static.implementation, _dispatch.dtype_refusal(dtype))


def _side_shape(operands: Operands) -> tuple[int, ...]:
    width = operands.query_up.shape[0]
    return (width,) if operands.low_rank else (width, _shapes.HEAD_DIM_QK)


def _results(
    *operands: jax.core.ShapedArray, same_over: frozenset[str], **_: object
) -> list[jax.core.ShapedArray]:
    named = Operands(*operands)
    shape = *named.slots.shape, named.query_up.shape[1], _shapes.HEAD_DIM_V
    dtype, pool = named.source.dtype, named.kv_cache.shape
    return [
        _manual_axes.result(operands, shape, dtype),
        _manual_axes.result(operands, pool, dtype, same_over),
    ]


def _kernel(
    *operands: jax.Array,
    softmax_scale: float,
    norm_eps: float,
    interleave: bool,
    same_over: frozenset[str],
    **_: object,
) -> Sequence[jax.Array]:
    """Calls the kernels; what they hand on to each other are further results, dropped here."""
    avals = Operands(*map(jax.typeof, operands))
    out, cache = _results(*avals, same_over=same_over)
    q_latent = _manual_axes.result(avals, out.shape, out.dtype)
    q_rope = _manual_axes.result(avals, (*out.shape[:3], _shapes.ROPE_DIM), out.dtype)
    width = avals.side.shape[0] if avals.low_rank else _shapes.HEAD_DIM_QK
    between = _manual_axes.result(avals, (*out.shape[:2], width), out.dtype)
    workspace = _primitives.decode_workspace(
        avals, out.shape, h_kv=1, num_sm_parts=avals.tile_scheduler_metadata.shape[0]
    )
    results = [out, cache, q_latent, q_rope, between, *workspace]
    target = _ffi.ABSORBED_ATTENTION_TARGET
    aliases = {Operands._fields.index("kv_cache"): 1}
    return jax.ffi.ffi_call(target, results, input_output_aliases=aliases)(
        *operands,
        softmax_scale=np.float32(softmax_scale),
        norm_eps=np.float32(norm_eps),
        interleave=interleave,
        low_rank=avals.low_rank,
    )[:2]


def _portable(
    *operands: jax.Array, softmax_scale: float, norm_eps: float, interleave: bool, **_: object
) -> tuple[jax.Array, jax.Array]:
    static = Static(softmax_scale, norm_eps, interleave, "xla")
    append = functools.partial(
        _cache_primitives.portable_append_projected, interleave=interleave, norm_eps=norm_eps
    )
    decode = functools.partial(
        _primitives.portable_decode, softmax_scale=softmax_scale, causal=True
    )
    return _compose(
        Operands(*operands),
        static,
        functools.partial(_queries.portable, interleave=interleave),
        lambda *arrays: append(*arrays)[0],
        lambda *arrays: decode(*arrays)[0],
    )


def _refusal(*operands: jax.Array) -> str | None:
    named = Operands(*operands)
    x = jax.ShapeDtypeStruct(named.projected_shape, named.source.dtype)
    if named.low_rank and not (0 < named.side.shape[0] <= MOST_RANK):
        return f"the low rank is {named.side.shape[0]}; the kernel norms up to {MOST_RANK} columns"
    return _queries.refusal(x, named.query_up, named.key_up)


_operation.define(
    absorbed_attention_p,
    _operation.Rules("MLA attention", _results, _kernel, _portable, _refusal),
)
