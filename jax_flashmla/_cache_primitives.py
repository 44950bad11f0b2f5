"""The primitives of the cache: the two appends and gather."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from jax_flashmla import (
    _cache_shapes,
    _dispatch,
    _ffi,
    _manual_axes,
    _mesh,
    _norm,
    _operation,
    _pool,
    _shapes,
    rope,
)
from jax_flashmla._dims import Dims
from jax_flashmla._dispatch import Implementation
from jax_flashmla._operation import Arrays

append_p = Primitive("flashmla_append")
append_projected_p = Primitive("flashmla_append_projected")
gather_p = Primitive("flashmla_gather")


def append(arrays: Arrays, *, interleave: bool, implementation: Implementation) -> jax.Array:
    """Appends checked rows: cache, latent, rope, slots and, to rotate, cos and sin."""
    return _write(_APPEND, arrays, interleave=interleave, implementation=implementation)


def append_projected(
    arrays: Arrays, *, interleave: bool, norm_eps: float, implementation: Implementation
) -> jax.Array:
    """Norms, rotates and appends: cache, projected, slots, latent_norm, cos, sin, checked."""
    static = {"interleave": interleave, "norm_eps": norm_eps, "implementation": implementation}
    return _write(_APPEND_PROJECTED, arrays, **static)


def gather(arrays: Arrays, *, implementation: Implementation) -> jax.Array:
    """Gathers checked tables: cache, block_table, cache_seqlens."""
    shape = _cache_shapes.check_gather(*arrays)
    if 0 in (*shape, arrays[0].shape[0]):
        return jnp.zeros(shape, arrays[0].dtype)
    return _gather_function(implementation)(*_manual_axes.align(arrays))[0]


# The functions around the primitives, one per set of static arguments.


@dataclasses.dataclass(frozen=True)
class _Append:
    """What the appends differ in.

    Attributes:
        primitive: Of one device. Its first operands are the cache and [n, ...].
        dims: Over a mesh.
        shared: Operands that all rows share.
    """

    primitive: Primitive
    dims: Dims
    shared: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operands."""
        return tuple(name for name, _ in self.dims.operands)


def _write(kind: _Append, arrays: Arrays, **static: object) -> jax.Array:
    if 0 in (arrays[0].shape[0], arrays[1].shape[0]):
        return arrays[0]
    return _append_function(kind, **static)(*_manual_axes.align(arrays))[0]


@functools.cache
def _append_function(kind: _Append, **static: object) -> Callable:
    def local(*arrays: jax.Array) -> list[jax.Array]:
        return kind.primitive.bind(*arrays, **static)

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        return list(_mesh.spread(local, kind.dims, arrays))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple:
        if not in_batched[0]:
            raise ValueError(
                "cache: got one page pool for rows mapped by vmap, expected a pool mapped with"
                " them: append the rows of all requests in one call"
            )
        folded = []
        for name, array, batched in zip(kind.names, arrays, in_batched, strict=False):
            if name in kind.shared:
                if batched:
                    raise ValueError(
                        f"{name}: got one for each row of a vmap, expected one for all"
                    )
                folded.append(array)
                continue
            (full,) = _operation.spread(axis_size, [batched], [array])
            if name == "slots":
                full = _offset(full, arrays[0].shape[1] * _shapes.PAGE_SIZE)
            folded.append(full.reshape(-1, *full.shape[2:]))
        return [_write(kind, tuple(folded), **static).reshape(arrays[0].shape)], [True]

    return _operation.inference_only("append", call)


@functools.cache
def _gather_function(implementation: Implementation) -> Callable:
    def local(*arrays: jax.Array) -> list[jax.Array]:
        return gather_p.bind(*arrays, implementation=implementation)

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        return list(_mesh.spread(local, _GATHER_DIMS, arrays))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple:
        cache = arrays[0]
        table, lengths = _operation.spread(axis_size, in_batched[1:], arrays[1:])
        if in_batched[0]:
            table = _offset(table, cache.shape[1])
            cache = cache.reshape(-1, *cache.shape[2:])
        folded = cache, table.reshape(-1, table.shape[2]), lengths.reshape(-1)
        pages = gather(folded, implementation=implementation)
        return [pages.reshape(axis_size, -1, *pages.shape[1:])], [True]

    return _operation.inference_only("gather", call)


def _offset(indices: jax.Array, size: int) -> jax.Array:
    """Lets row i of `[axis_size, ...]` point into the i-th of several pools laid end to end."""
    which = jnp.arange(indices.shape[0], dtype=jnp.int32)
    return _pool.offset(indices, which.reshape(-1, *[1] * (indices.ndim - 1)), size)


# Over a mesh.

_POOL = "pages slots kv_heads columns"


def _append_dims(*rows: tuple[str, str]) -> Dims:
    """Of an append of these operands: the rows are sharded only with their pool."""
    return Dims(
        operands=(("cache", _POOL), *rows, ("cos", "rows pairs"), ("sin", "rows pairs")),
        results=(_POOL,),
        sharded=frozenset(["rows"]),
        follows=(("pages", "rows", False),),  # else the pools would become different
    )


_APPEND = _Append(
    append_p, _append_dims(("latent", "rows latent"), ("rope", "rows rope"), ("slots", "rows"))
)
_APPEND_PROJECTED = _Append(
    append_projected_p,
    _append_dims(("projected", "rows width"), ("slots", "rows"), ("latent_norm", "latent")),
    shared=("latent_norm",),
)
_GATHER_DIMS = Dims(
    operands=(("cache", _POOL), ("block_table", "batch width"), ("cache_seqlens", "batch")),
    results=("batch tokens kv_heads columns",),
    sharded=frozenset(["batch", "kv_heads"]),
    follows=(("pages", "batch", True),),
)


# Abstract evaluation.


def _append_results(
    *operands: jax.core.ShapedArray, implementation: Implementation, **_: object
) -> list[jax.core.ShapedArray]:
    _cache_shapes.check_append(*operands)
    _dispatch.check_request(implementation, _refusal(*operands))
    return [_manual_axes.result(operands, operands[0].shape, operands[0].dtype)]


def _append_projected_results(
    *operands: jax.core.ShapedArray, implementation: Implementation, **_: object
) -> list[jax.core.ShapedArray]:
    _cache_shapes.check_append_projected(*operands)
    _dispatch.check_request(implementation, projected_refusal(*operands))
    return [_manual_axes.result(operands, operands[0].shape, operands[0].dtype)]


def _gather_results(
    *operands: jax.core.ShapedArray, implementation: Implementation, **_: object
) -> list[jax.core.ShapedArray]:
    shape = _cache_shapes.check_gather(*operands)
    _dispatch.check_request(implementation, _refusal(*operands))
    return [_manual_axes.result(operands, shape, operands[0].dtype)]


# Lowerings.


def _portable_append(*operands: jax.Array, interleave: bool, **_: object) -> list[jax.Array]:
    """Scatters whole rows; XLA does it in place where the cache may be overwritten."""
    cache, latent, key, slots, *rotation = operands
    if rotation:
        key = rope.rotate(key, *rotation, interleave=interleave)
    rows = jnp.concatenate([latent, key], axis=-1)
    page, offset = slots // _shapes.PAGE_SIZE, slots % _shapes.PAGE_SIZE
    places = cache.at[page, offset, 0]  # a flat view of the tokens would cost copies of the cache
    return [places.set(rows, mode="drop", wrap_negative_indices=False)]


def _kernel_append(*operands: jax.Array, interleave: bool, **static: object) -> Sequence[jax.Array]:
    results = _append_results(*map(jax.typeof, operands), **static)
    call = jax.ffi.ffi_call(_ffi.APPEND_TARGET, results, input_output_aliases={0: 0})
    return call(*operands, interleave=interleave)


def portable_append_projected(
    *operands: jax.Array, interleave: bool, norm_eps: float, **_: object
) -> list[jax.Array]:
    cache, projected, slots, latent_norm, *rotation = operands
    cached = projected[:, -_shapes.HEAD_DIM_QK :]
    latent, key = jnp.split(cached, [_shapes.KV_LORA_RANK], axis=-1)
    latent = _norm.rms_norm(latent, latent_norm, norm_eps)
    return _portable_append(cache, latent, key, slots, *rotation, interleave=interleave)


def _kernel_append_projected(
    *operands: jax.Array, interleave: bool, norm_eps: float, **static: object
) -> Sequence[jax.Array]:
    results = _append_projected_results(*map(jax.typeof, operands), **static)
    target = _ffi.APPEND_PROJECTED_TARGET
    call = jax.ffi.ffi_call(target, results, input_output_aliases={0: 0})
    return call(*operands, interleave=interleave, norm_eps=np.float32(norm_eps))


def _portable_gather(
    cache: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array, **_: object
) -> list[jax.Array]:
    pages = cache.at[block_table].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    tokens = pages.reshape(block_table.shape[0], -1, *cache.shape[2:])
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    inside = positions[None] < cache_seqlens[:, None]
    return [jnp.where(inside[..., None, None], tokens, 0)]


def _kernel_gather(*operands: jax.Array, **static: object) -> Sequence[jax.Array]:
    results = _gather_results(*map(jax.typeof, operands), **static)
    return jax.ffi.ffi_call(_ffi.GATHER_TARGET, results)(*operands)


def _refusal(*operands: jax.Array) -> str | None:
    return _dispatch.dtype_refusal(operands[0].dtype)


def projected_refusal(*operands: jax.Array) -> str | None:
    width = operands[1].shape[1]
    if width % 8:
        return f"projected has {width} columns; the kernel reads 16 bytes at a time"
    return _refusal(*operands)


_operation.define(
    append_p,
    _operation.Rules("append", _append_results, _kernel_append, _portable_append, _refusal),
)
_operation.define(
    append_projected_p,
    _operation.Rules(
        "append_projected",
        _append_projected_results,
        _kernel_append_projected,
        portable_append_projected,
        projected_refusal,
    ),
)
_operation.define(
    gather_p,
    _operation.Rules("gather", _gather_results, _kernel_gather, _portable_gather, _refusal),
)
