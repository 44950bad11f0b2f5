"""The merge of partial attention results over disjoint keys."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.typing import DTypeLike

from jax_flashmla import _cache_shapes, _dispatch, _ffi, _manual_axes, _mesh, _operation, _shapes
from jax_flashmla._dims import Dims
from jax_flashmla._dispatch import Implementation

KERNEL_COLUMNS = 8  # the kernel works on vectors of this many columns

merge_p = Primitive("flashmla_merge")


def merge_partials(
    outs: jax.Array,
    lses: jax.Array,
    *,
    dtype: DTypeLike | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges attention results over disjoint sets of keys into the result over all of them.

    In three lines, for rows that see a key somewhere::

        lse = jax.nn.logsumexp(lses, axis=0)                                  # [...]
        weights = jnp.exp(lses - lse)                                         # [n, ...], sums to 1
        out = (weights[..., None] * outs.astype(jnp.float32)).sum(axis=0)     # [..., d]

    A partial whose lse is -inf is empty: its out never reaches the result, NaN included. Where all
    are empty out is 0 and lse -inf. `mla_decode` returns such partials; FlashMLA's convention, +inf
    for empty rows, is not understood here and gives NaN. This is the merge of FlashDecoding and of
    context parallelism, where each device attends its own part of the cache. Over a mesh the
    dimensions between the first and the last may be sharded.

    Args:
        outs: `[n, ..., d]`, bfloat16, float16 or float32: n partial results.
        lses: float32 `[n, ...]`, the natural log-sum-exp of each partial's logits.
        dtype: of the result, bfloat16, float16 or float32; None for that of outs. Keep partials
            in float32 where they exist so, and round here, once.
        implementation: "cuda" for the kernel or an error that says why it cannot run, "xla" for
            the portable lowering, None for the kernel wherever it can run. The kernel merges all
            three dtypes and needs d to be a multiple of 8.

    Returns:
        out `[..., d]` of the dtype asked for, computed in float32 and rounded once, and lse float32
        `[...]`.

    Raises:
        ValueError: a shape or sharding is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    outs, lses = _shapes.as_arrays(outs=outs, lses=lses)
    shape = _cache_shapes.check_merge(outs, lses)
    chosen = outs.dtype if dtype is None else _cache_shapes.check_out_dtype(dtype)
    _dispatch.check_request(implementation, _refusal(outs, lses))
    if shape.is_trivial:
        return (
            jnp.zeros((*shape.rows, shape.head_dim), chosen),
            jnp.full(shape.rows, -jnp.inf, jnp.float32),
        )
    out, lse = _merge_function(chosen, implementation)(*_manual_axes.align([outs, lses]))
    return out, lse


@functools.cache
def _merge_function(dtype: np.dtype, implementation: Implementation) -> Callable:
    static = {"dtype": dtype, "implementation": implementation}

    def local(outs: jax.Array, lses: jax.Array) -> list[jax.Array]:
        return merge_p.bind(outs, lses, **static)

    @jax.custom_batching.custom_vmap
    def call(outs: jax.Array, lses: jax.Array) -> list[jax.Array]:
        return list(_mesh.spread(local, row_dims(lses.ndim - 1), [outs, lses]))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple:
        # The mapped axis becomes one of the row dimensions, behind the partials.
        moved = [jnp.moveaxis(x, 0, 1) for x in _operation.spread(axis_size, in_batched, arrays)]
        return list(merge_partials(*moved, **static)), [True, True]

    return _operation.inference_only("merge_partials", call)


@functools.cache
def row_dims(count: int, *more: tuple[str, str]) -> Dims:
    """Names `count` dimensions of rows, each of which may be sharded; `more` operands may not."""
    names = [f"rows{i}" for i in range(count)]
    rows = " ".join(names)
    return Dims(
        operands=(("outs", f"partials {rows} columns"), ("lses", f"partials {rows}"), *more),
        results=(f"{rows} columns", rows),
        sharded=frozenset(names),
    )


def _results(
    *operands: jax.core.ShapedArray, dtype: np.dtype, implementation: Implementation
) -> list[jax.core.ShapedArray]:
    shape = _cache_shapes.check_merge(*operands)
    _dispatch.check_request(implementation, _refusal(*operands))
    return [
        _manual_axes.result(operands, (*shape.rows, shape.head_dim), dtype),
        _manual_axes.result(operands, shape.rows, jnp.float32),
    ]


def _portable(
    outs: jax.Array, lses: jax.Array, *, dtype: np.dtype, **_: object
) -> tuple[jax.Array, jax.Array]:
    """Merges with zeros in the place of empty partials, because 0 * NaN is NaN."""
    top = lses.max(axis=0)
    finite_top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
    weights = jnp.exp(lses - finite_top[None])
    total = weights.sum(axis=0)
    kept = jnp.where((lses == -jnp.inf)[..., None], 0.0, outs.astype(jnp.float32))
    summed = (weights[..., None] * kept).sum(axis=0)
    out = summed / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(dtype), finite_top + jnp.log(total)


def _kernel(outs: jax.Array, lses: jax.Array, **static: object) -> Sequence[jax.Array]:
    """Calls the kernel on `[n, rows, d]`."""
    out, lse = _results(jax.typeof(outs), jax.typeof(lses), **static)
    n, d = outs.shape[0], outs.shape[-1]
    flat = outs.reshape(n, -1, d), lses.reshape(n, -1)
    results = _results(*map(jax.typeof, flat), **static)
    merged = jax.ffi.ffi_call(_ffi.MERGE_TARGET, results)(*flat)
    return [x.reshape(y.shape) for x, y in zip(merged, (out, lse), strict=True)]


def _refusal(outs: jax.Array, lses: jax.Array) -> str | None:
    del lses
    d = outs.shape[-1]
    if d == 0 or d % KERNEL_COLUMNS:
        return f"d = {d} is not a multiple of {KERNEL_COLUMNS}"
    return None


_operation.define(
    merge_p, _operation.Rules("merge_partials", _results, _kernel, _portable, _refusal)
)
