"""Varying manual axes: which mesh axes of an enclosing `jax.shard_map` a value varies over.

The check of shard_map (`check_vma=True`) wants to know it of every result.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike


def align(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Lets all operands vary over the same axes, as a custom call demands."""
    avals = [jax.typeof(x) for x in operands]
    varying = _varying(avals)
    missing = [tuple(varying - aval.manual_axis_type.varying) for aval in avals]
    return [
        jax.lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(operands, missing, strict=True)
    ]


def result(
    operands: Sequence[jax.core.ShapedArray],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    same_over: frozenset[str] = frozenset(),
) -> jax.core.ShapedArray:
    """Describes a result that varies over the axes of the operands, but for those named."""
    varying = _varying(operands)
    if not varying:
        return jax.core.ShapedArray(shape, jnp.dtype(dtype))
    return jax.core.ShapedArray(
        shape,
        jnp.dtype(dtype),
        sharding=NamedSharding(operands[0].sharding.mesh, PartitionSpec()),
        manual_axis_type=ManualAxisType(varying=varying - same_over),
    )


def gather(x: jax.Array, axis_name: str, dimension: int) -> jax.Array:
    """Gathers shards along a dimension; the check learns that all devices have the same."""
    to = "invarying" if jax.typeof(x).manual_axis_type.varying else "varying"
    return jax.lax.all_gather(x, axis_name, axis=dimension, tiled=True, to=to)


def varying(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The axes that any of the arrays varies over."""
    return _varying([jax.typeof(x) for x in arrays])


def _varying(avals: Sequence[jax.core.ShapedArray]) -> frozenset[str]:
    return frozenset().union(*(aval.manual_axis_type.varying for aval in avals))
