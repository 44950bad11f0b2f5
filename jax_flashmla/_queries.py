"""The primitive behind `mla.absorbed_queries`: queries from what they are projected from."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jax_flashmla import _cache_shapes, _dispatch, _ffi, _manual_axes, _mesh, _operation, _shapes
from jax_flashmla._dims import Dims
from jax_flashmla._dispatch import Implementation
from jax_flashmla._operation import Arrays
from jax_flashmla.rope import rotate

KERNEL_NOPE_DIMS = 128, 192
KERNEL_WIDTH = 64  # the kernel takes so many columns of x at a time
MOST_KERNEL_WIDTH = 2**20
MOST_KERNEL_HEADS = 2**12
MOST_KERNEL_TOKENS = 128  # beyond it products are bound by FLOP, and XLA's are faster

absorbed_queries_p = Primitive("flashmla_absorbed_queries")


def absorbed_queries(arrays: Arrays, *, interleave: bool, implementation: Implementation) -> Arrays:
    """Projects, rotates and absorbs checked arrays: x, query_up, key_up, cos, sin[, down].

    `down` is given where cached rows are projected from x, too.

    Returns:
        q_latent, q_rope and, given down, x times it, `[b, s_q, 576]`.
    """
    x, query_up = arrays[:2]
    if 0 in (*x.shape, query_up.shape[1]):
        return tuple(portable(*arrays, interleave=interleave))
    function = _function(interleave, implementation)
    return tuple(function(*arrays))


def project(
    x: jax.Array, query_up: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool
) -> tuple[jax.Array, jax.Array]:
    """Projects `[..., width]` to q_nope `[..., h_q, nope]` and rotated q_rope `[..., h_q, 64]`."""
    rows = x.shape[0]
    x, cos, sin = (at_least_two_rows(array) for array in (x, cos, sin))
    q = jnp.einsum("bsr,rhd->bshd", x, query_up)
    q_nope, q_rope = jnp.split(q, [q.shape[-1] - _shapes.ROPE_DIM], axis=-1)
    by_head = cos[..., None, :], sin[..., None, :]
    return q_nope[:rows], rotate(q_rope, *by_head, interleave=interleave)[:rows]


def project_down(x: jax.Array, down: jax.Array) -> jax.Array:
    """Projects `[b, s_q, width]` to `[b, s_q, columns]`."""
    return (at_least_two_rows(x) @ down)[: x.shape[0]]


def absorb(q_nope: jax.Array, key_up: jax.Array) -> jax.Array:
    """Applies W_UK to the queries: `[b, s_q, h_q, nope]` to `[b, s_q, h_q, 512]`."""
    rows = at_least_two_rows(q_nope)
    return jnp.einsum("bshn,hnc->bshc", rows, key_up)[: q_nope.shape[0]]


def at_least_two_rows(x: jax.Array) -> jax.Array:
    """Repeats a single row: `[1, 1, ...]` becomes `[2, 1, ...]`; more rows stay as they are.

    XLA does not take the product of one row and a few million weights for a matrix product: it
    writes the weights times the row to memory, rounded, and sums that up. In V2-Lite's shapes on an
    H200 a layer at batch 1 took 67 us that way and takes 37 with two rows (JAX 0.11.2).
    """
    return jnp.broadcast_to(x, (2, *x.shape[1:])) if x.shape[:2] == (1, 1) else x


def check(
    x: jax.Array,
    query_up: jax.Array,
    key_up: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *down: jax.Array,
) -> None:
    """Checks the arrays of `absorbed_queries`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    _shapes.check_shape("x", x, ("b", "s_q", "width"))
    _shapes.check_float("x", x)
    _shapes.check_shape("key_up", key_up, ("h_q", "qk_nope_head_dim", _shapes.KV_LORA_RANK))
    h_q, nope, _ = key_up.shape
    _shapes.check_shape("query_up", query_up, (x.shape[2], h_q, nope + _shapes.ROPE_DIM))
    for array in down:
        _shapes.check_shape("down", array, (x.shape[2], _shapes.HEAD_DIM_QK))
    names = "query_up", "key_up", "down"
    for name, array in zip(names, (query_up, key_up, *down), strict=False):
        _shapes.check_dtype(name, array, x.dtype)
    for name, array in (("cos", cos), ("sin", sin)):
        _shapes.check_shape(name, array, (*x.shape[:2], _cache_shapes.ROPE_PAIRS))
        _shapes.check_dtype(name, array, jnp.float32)


def refusal(*operands: jax.Array) -> str | None:
    """Says why there is no kernel for the operands, None when there is one."""
    x, _, key_up = operands[:3]
    if x.shape[-1] > MOST_KERNEL_WIDTH or key_up.shape[0] > MOST_KERNEL_HEADS:
        most = f"{MOST_KERNEL_WIDTH} columns and {MOST_KERNEL_HEADS} heads"
        return (
            f"x has {x.shape[-1]} columns, key_up {key_up.shape[0]} heads; the kernel takes {most}"
        )
    if x.shape[-1] % KERNEL_WIDTH:
        return f"x has {x.shape[-1]} columns; the kernel takes {KERNEL_WIDTH} at a time"
    if key_up.shape[1] not in KERNEL_NOPE_DIMS:
        return f"qk_nope_head_dim is {key_up.shape[1]}; the kernel has 128 and 192"
    return _dispatch.dtype_refusal(x.dtype)


@functools.cache
def _function(interleave: bool, implementation: Implementation) -> Callable:
    static = {"interleave": interleave}

    def local(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(project_here(arrays, **static, implementation=implementation))

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> list[jax.Array]:
        dims = _DIMS if len(arrays) < len(_DIMS_WITH_DOWN.operands) else _DIMS_WITH_DOWN
        return list(_mesh.spread(local, dims, arrays, align=False))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple:
        x, query_up, key_up, cos, sin, *down = arrays
        if in_batched[1] or in_batched[2] or any(in_batched[5:]):
            if implementation == "cuda":
                raise ValueError(
                    "implementation: got 'cuda' and weights mapped by vmap, expected one set of"
                    " weights for all: the kernel takes no other"
                )
            axes = [0 if batched else None for batched in in_batched]
            results = jax.vmap(functools.partial(portable, **static), axes)(*arrays)
            return list(results), [True] * len(results)
        rows = [in_batched[i] for i in (0, 3, 4)]
        x, cos, sin = _operation.fold_leading(axis_size, rows, (x, cos, sin))
        results = absorbed_queries(
            (x, query_up, key_up, cos, sin, *down), **static, implementation=implementation
        )
        return [y.reshape(axis_size, -1, *y.shape[1:]) for y in results], [True] * len(results)

    return _operation.inference_only("absorbed_queries", call)


def project_here(
    arrays: Sequence[jax.Array], *, interleave: bool, implementation: Implementation
) -> list[jax.Array]:
    """`absorbed_queries` on what a device has: the kernel where it is faster."""
    if implementation is None and (refusal(*arrays) or has_many_tokens(arrays[0])):
        implementation = "xla"
    aligned = _manual_axes.align(arrays)
    same_over = _manual_axes.varying(aligned) - _manual_axes.varying([arrays[0], *arrays[5:]])
    return absorbed_queries_p.bind(
        *aligned, interleave=interleave, implementation=implementation, same_over=same_over
    )


def has_many_tokens(x: jax.Array) -> bool:
    """Not where the batch is symbolic: the kernel takes any."""
    tokens = x.shape[0] * x.shape[1]
    return isinstance(tokens, int) and tokens > MOST_KERNEL_TOKENS


_DIMS = Dims(
    operands=(
        ("x", "batch queries width"),
        ("query_up", "width heads head_dim"),
        ("key_up", "heads nope latent"),
        ("cos", "batch queries pairs"),
        ("sin", "batch queries pairs"),
    ),
    results=("batch queries heads latent", "batch queries heads rope"),
    sharded=frozenset(["batch", "queries", "heads"]),
    gathered=frozenset(["width", "head_dim", "nope", "latent"]),  # weights that are stored divided
)


_DIMS_WITH_DOWN = dataclasses.replace(
    _DIMS,
    operands=(*_DIMS.operands, ("down", "width columns")),
    results=(*_DIMS.results, "batch queries columns"),
    gathered=_DIMS.gathered | {"columns"},
)


def _result_shapes(*arrays: jax.Array) -> list[tuple[int, ...]]:
    x, query_up = arrays[:2]
    heads = *x.shape[:2], query_up.shape[1]
    shapes = [(*heads, _shapes.KV_LORA_RANK), (*heads, _shapes.ROPE_DIM)]
    return [*shapes, *((*x.shape[:2], down.shape[1]) for down in arrays[5:])]


def _results(
    *operands: jax.core.ShapedArray,
    implementation: Implementation,
    same_over: frozenset[str],
    **_: object,
) -> list[jax.core.ShapedArray]:
    check(*operands)
    _dispatch.check_request(implementation, refusal(*operands))
    dtype = operands[0].dtype
    over = frozenset(), frozenset(), same_over
    return [
        _manual_axes.result(operands, shape, dtype, axes)
        for shape, axes in zip(_result_shapes(*operands), over, strict=False)
    ]


def portable(
    x: jax.Array,
    query_up: jax.Array,
    key_up: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *down: jax.Array,
    interleave: bool,
    **_: object,
) -> list[jax.Array]:
    q_nope, q_rope = project(x, query_up, cos, sin, interleave=interleave)
    return [absorb(q_nope, key_up), q_rope, *(project_down(x, weights) for weights in down)]


def _kernel(*operands: jax.Array, interleave: bool, **static: object) -> Sequence[jax.Array]:
    results = _results(*map(jax.typeof, operands), **static)
    call = jax.ffi.ffi_call(_ffi.ABSORBED_QUERIES_TARGET, results)
    return call(*operands, interleave=interleave)


_operation.define(
    absorbed_queries_p,
    _operation.Rules("absorbed_queries", _results, _kernel, portable, refusal),
)
