"""The primitives of a decode step: shapes, lowerings, batching; `_operation` says what all share.

Around the decode primitive stand, from the outside in, the rule that refuses derivatives and the
rule that folds a mapped axis into the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jax_flashmla import _dispatch, _ffi, _manual_axes, _mesh, _operation, _shapes, reference
from jax_flashmla import schedule as _schedule
from jax_flashmla._dims import Dims
from jax_flashmla._dispatch import Implementation
from jax_flashmla.schedule import Schedule

Arrays = tuple[jax.Array, ...]

schedule_p = Primitive("mla_schedule")
decode_p = Primitive("mla_decode")


def schedule(
    cache_seqlens: jax.Array, *, num_sm_parts: int, implementation: Implementation
) -> Schedule:
    """Schedules checked lengths, int32 `[b]`. An empty batch never reaches the primitive."""
    if cache_seqlens.shape[0] == 0:
        metadata = jnp.zeros((num_sm_parts, _shapes.TileSchedulerMetaDataSize), jnp.int32)
        return Schedule(metadata, jnp.zeros(1, jnp.int32))
    return Schedule(*_schedule_function(num_sm_parts, implementation)(cache_seqlens))


def decode(
    arrays: Arrays,
    given: Schedule | None,
    *,
    num_sm_parts: int | None,
    softmax_scale: float,
    causal: bool,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Decodes checked arrays.

    Args:
        arrays: q_latent, q_rope, kv_cache, block_table, cache_seqlens; the first two may be one
            joined array, passed twice.
        given: the schedule, None to make one here.
        num_sm_parts: parts of a schedule made here, None for as many as fill the GPU with the
            queries of one device.
        softmax_scale: factor of the logits.
        causal: whether a query is hidden from the keys after it.
        implementation: as in `_dispatch.takes_kernel`.

    Returns:
        out `[b, s_q, h_q, 512]` and lse float32 `[b, s_q, h_q]`, -inf on empty rows.
    """
    shape, dtype = _shapes.decode_shape(*arrays), arrays[0].dtype
    if shape.is_trivial:
        return jnp.zeros(shape.out, dtype), jnp.full(shape.lse, -jnp.inf, jnp.float32)
    function = _decode_function(num_sm_parts, softmax_scale, causal, implementation)
    out, lse = function(*_manual_axes.align([*arrays, *(given or ())]))
    return out, lse


def decode_here(
    operands: Sequence[jax.Array],
    *,
    num_sm_parts: int | None,
    implementation: Implementation,
    **static: object,
) -> list[jax.Array]:
    """`decode` on what a device has: its arrays and, perhaps, a schedule."""
    arrays, given = operands[:5], operands[5:]
    shape = _shapes.decode_shape(*arrays)
    given = schedule_here(
        given,
        arrays[-1],
        num_sm_parts=num_sm_parts,
        rows=shape.rows,
        h_kv=shape.h_kv,
        implementation=implementation,
    )
    return decode_p.bind(*arrays, *given, **static, implementation=implementation)


def schedule_here(
    given: Sequence[jax.Array],
    cache_seqlens: jax.Array,
    *,
    num_sm_parts: int | None,
    rows: int,
    h_kv: int,
    implementation: Implementation,
) -> Sequence[jax.Array]:
    """The schedule that was given, or one of what a device has of the batch."""
    # One of the whole batch is of no use to a device's part of it.
    if given and given[1].shape[0] == cache_seqlens.shape[0] + 1:
        return given
    parts = given[0].shape[0] if given else num_sm_parts
    return schedule_p.bind(
        cache_seqlens,
        num_sm_parts=parts or _schedule.default_num_sm_parts(rows, h_kv),
        implementation=implementation,
    )


# The functions around the primitives, one per set of static arguments.


@functools.cache
def _schedule_function(num_sm_parts: int, implementation: Implementation) -> Callable:
    static = {"num_sm_parts": num_sm_parts, "implementation": implementation}

    def local(cache_seqlens: jax.Array) -> list[jax.Array]:
        return schedule_p.bind(cache_seqlens, **static)

    @jax.custom_batching.custom_vmap
    def call(cache_seqlens: jax.Array) -> list[jax.Array]:
        return list(_mesh.spread(local, _SCHEDULE_DIMS, [cache_seqlens]))

    @call.def_vmap
    def map_rows(axis_size: int, in_batched: list[bool], cache_seqlens: jax.Array) -> tuple:
        del axis_size, in_batched  # the only operand is the mapped one
        results = jax.lax.map(lambda row: schedule(row, **static), cache_seqlens)
        return list(results), [True, True]

    return _mesh.compiled(call)


@functools.cache
def _decode_function(
    num_sm_parts: int | None, softmax_scale: float, causal: bool, implementation: Implementation
) -> Callable:
    static = {"softmax_scale": softmax_scale, "causal": causal, "implementation": implementation}

    def local(*operands: jax.Array) -> list[jax.Array]:
        return decode_here(operands, **static, num_sm_parts=num_sm_parts)

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> list[jax.Array]:
        one_kv_head = operands[2].shape[2] == 1
        dims = _DECODE_DIMS if one_kv_head else _DECODE_DIMS_OF_KV_HEADS
        return list(_mesh.spread(local, dims, operands))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple:
        # A schedule of the smaller batches is of no use to the larger one.
        arrays = _fold_batch(axis_size, in_batched[:5], operands[:5])
        out, lse = decode(arrays, None, num_sm_parts=num_sm_parts, **static)
        batch = operands[4].shape[-1]
        unfolded = [x.reshape(axis_size, batch, *x.shape[1:]) for x in (out, lse)]
        return unfolded, [True, True]

    return _operation.inference_only("MLA decode", call)


def _fold_batch(axis_size: int, in_batched: Sequence[bool], arrays: Arrays) -> Arrays:
    """Folds a mapped axis into the batch of all arrays but the pool."""
    if in_batched[2]:
        raise ValueError(
            "kv_cache: got a page pool mapped by vmap, expected one pool for all: put the pages"
            " in one pool [num_pages, 64, h_kv, 576] and map the block table over it"
        )
    queries = _operation.fold_leading(axis_size, in_batched[:2], arrays[:2])
    requests = _operation.fold_leading(axis_size, in_batched[3:], arrays[3:])
    return (*queries, arrays[2], *requests)


# Over a mesh.

_SCHEDULE_DIMS = Dims(
    operands=(("cache_seqlens", "batch"),),
    results=("parts fields", "totals"),
    sharded=frozenset(),
    gathered=frozenset(["batch"]),  # the schedule is of the whole batch
)
_DECODE_DIMS = Dims(
    operands=(
        ("q_latent", "batch queries heads latent"),
        ("q_rope", "batch queries heads rope"),
        ("kv_cache", "pages slots kv_heads columns"),
        ("block_table", "batch width"),
        ("cache_seqlens", "batch"),
        ("tile_scheduler_metadata", "parts fields"),
        ("num_splits", "totals"),
    ),
    results=("batch queries heads values", "batch queries heads"),
    sharded=frozenset(["batch", "heads"]),
    follows=(("pages", "batch", True),),
)
# Query heads stay with their KV head.
_DECODE_DIMS_OF_KV_HEADS = dataclasses.replace(
    _DECODE_DIMS, follows=(*_DECODE_DIMS.follows, ("kv_heads", "heads", False))
)


# Abstract evaluation.


def _schedule_results(
    cache_seqlens: jax.core.ShapedArray, *, num_sm_parts: int, **_: object
) -> list[jax.core.ShapedArray]:
    batch = _shapes.check_seqlens(cache_seqlens)
    rows = _shapes.check_count("num_sm_parts", num_sm_parts)
    shapes = (rows, _shapes.TileSchedulerMetaDataSize), (batch + 1,)
    return [_manual_axes.result([cache_seqlens], shape, jnp.int32) for shape in shapes]


def _decode_results(
    *operands: jax.core.ShapedArray, implementation: Implementation, **_: object
) -> list[jax.core.ShapedArray]:
    *arrays, metadata, num_splits = operands
    shape = _shapes.decode_shape(*arrays)
    _shapes.check_schedule(metadata, num_splits, shape.batch, None)
    dtype = arrays[0].dtype
    _dispatch.check_request(implementation, _refusal(*arrays))
    return [
        _manual_axes.result(operands, shape.out, dtype),
        _manual_axes.result(operands, shape.lse, jnp.float32),
    ]


# Lowerings.


def _portable_schedule(cache_seqlens: jax.Array, *, num_sm_parts: int, **_: object) -> Schedule:
    return _schedule.plan(cache_seqlens, num_sm_parts)


def _kernel_schedule(cache_seqlens: jax.Array, **static: object) -> list[jax.Array]:
    results = _schedule_results(jax.typeof(cache_seqlens), **static)
    return jax.ffi.ffi_call(_ffi.SCHEDULE_TARGET, results)(cache_seqlens)


def portable_decode(
    *operands: jax.Array, softmax_scale: float, causal: bool, **_: object
) -> tuple[jax.Array, jax.Array]:
    """Ignores the schedule: every split gives the same result."""
    q_latent, q_rope, kv_cache, block_table, cache_seqlens, _, _ = operands
    joined = q_rope.shape[-1] == _shapes.HEAD_DIM_QK
    q = q_latent if joined else jnp.concatenate([q_latent, q_rope], axis=-1)
    return reference.streamed(
        q, kv_cache, block_table, cache_seqlens, softmax_scale=softmax_scale, causal=causal
    )


def _kernel_decode(
    *operands: jax.Array, softmax_scale: float, causal: bool, **static: object
) -> Sequence[jax.Array]:
    """Calls the kernel, whose workspace is two further results that are dropped here."""
    avals = [jax.typeof(x) for x in operands]
    out, lse = _decode_results(*avals, **static)
    shape = _shapes.decode_shape(*operands[:5])
    _, *partial = decode_workspace(
        avals, out.shape, h_kv=shape.h_kv, num_sm_parts=operands[5].shape[0]
    )
    call = jax.ffi.ffi_call(_ffi.DECODE_TARGET, [out, lse, *partial])
    return call(*operands, softmax_scale=np.float32(softmax_scale), causal=causal)[:2]


def decode_workspace(
    avals: Sequence[jax.core.ShapedArray], out: tuple[int, ...], *, h_kv: int, num_sm_parts: int
) -> list[jax.core.ShapedArray]:
    """Describes what the kernel writes besides `out`: lse and partial results.

    A part begins at most one request it shares with the part before and ends at most one it shares
    with the part after: two partial tiles per part are all there can be.
    """
    rows = out[1] * out[2] // h_kv
    partial = 2 * num_sm_parts, h_kv, rows
    return [
        _manual_axes.result(avals, out[:3], jnp.float32),
        _manual_axes.result(avals, (*partial, _shapes.HEAD_DIM_V), jnp.float16),
        _manual_axes.result(avals, (*partial, 4), jnp.float32),
    ]


def _refusal(*operands: jax.Array) -> str | None:
    return _dispatch.dtype_refusal(operands[0].dtype)


_operation.define(
    schedule_p,
    _operation.Rules("MLA decode", _schedule_results, _kernel_schedule, _portable_schedule),
)
_operation.define(
    decode_p,
    _operation.Rules("MLA decode", _decode_results, _kernel_decode, portable_decode, _refusal),
)
