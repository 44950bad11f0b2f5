"""Operations over a mesh: each device works on its own part of the operands.

Every operation is a device-local function with named dimensions. Where its operands are divided
over a mesh, each device calls that function on its own part:

- Explicit axes: the shardings are known while tracing, and `jax.shard_map` does it.
- Auto axes: XLA decides the shardings when it compiles, and `custom_partitioning` does it. Programs
  for one device are lowered without a trace of it.
- Manual axes, inside `jax.shard_map`: the operands are local already.

No operand but one that `Dims.gathered` names is ever gathered: what cannot be computed from local
parts is an error.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from jax_flashmla import _auto_export, _manual_axes
from jax_flashmla._dims import Axes, Dims, Division, text

Arrays = tuple[jax.Array, ...]


def spread(
    local: Callable[..., Arrays],
    dims: Dims,
    operands: Sequence[jax.Array],
    *,
    align: bool = True,
) -> Arrays:
    """Calls a device-local function on operands that may be divided over a mesh.

    Args:
        local: takes the operands, or a device's part of each, and returns a tuple. The same object
            for the same operation: what is traced and compiled is kept by it.
        dims: what may be divided.
        operands: without the operands at the end that are optional.
        align: whether inside a `jax.shard_map` all of them shall vary over the same axes.

    Raises:
        ValueError: the operands are divided over Explicit axes in a way that `dims` excludes, or
            the mesh is of a kind that is not supported.
    """
    dims = dataclasses.replace(dims, operands=dims.operands[: len(operands)])
    mesh = _mesh_of(operands)
    explicit, auto, manual = (
        _axes_of_kind(mesh, kind) for kind in (AxisType.Explicit, AxisType.Auto, AxisType.Manual)
    )
    if auto and (explicit or (manual and len(auto) > 1)):
        raise ValueError(
            f"mesh: got Auto axes {text(auto)} beside axes {text(explicit + manual)}, which are"
            " Explicit or Manual, expected one kind, or one Auto axis beside Manual ones: call"
            " inside a jax.shard_map over all axes"
        )
    aligned = _aligned(local) if align else local
    if explicit:
        return _over_explicit_axes(aligned, dims, mesh, operands)
    if manual and not auto:
        return aligned(*operands)
    guarded = _auto_export.guard(operands[0]), *operands[1:]
    return _over_auto_axes(aligned, dims, bool(manual))(*guarded)


def compiled(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Compiles calls outside of jit: run piece by piece, they would not meet the partitioner."""
    jitted = jax.jit(function)

    def call(*operands: jax.Array) -> Arrays:
        traced = any(isinstance(x, jax.core.Tracer) for x in operands)
        return (function if traced else jitted)(*operands)

    return call


def _axes_of_kind(mesh: jax.sharding.AbstractMesh, kind: AxisType) -> Axes:
    """Leaves out the axes of one device that are still to be divided over."""
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    least = 1 if kind == AxisType.Manual else 2
    return tuple(name for name, have in kinds if have == kind and mesh.shape[name] >= least)


@functools.cache
def _aligned(local: Callable[..., Arrays]) -> Callable[..., Arrays]:
    def call(*operands: jax.Array) -> Arrays:
        return tuple(local(*_manual_axes.align(operands)))

    return call


def _mesh_of(operands: Iterable[jax.Array]) -> jax.sharding.AbstractMesh:
    """The mesh of the context, without one that of the operands."""
    mesh = jax.sharding.get_abstract_mesh()
    for operand in operands:
        if mesh.empty:
            mesh = jax.typeof(operand).sharding.mesh
    return mesh


def _over_explicit_axes(
    local: Callable[..., Arrays],
    dims: Dims,
    mesh: jax.sharding.AbstractMesh,
    operands: Sequence[jax.Array],
) -> Arrays:
    specs = [_axes(jax.typeof(x).sharding, x.ndim) for x in operands]
    division = dims.divided(specs, mesh.shape)
    dims.check_even(division, [x.shape for x in operands], mesh.shape)
    wanted = tuple(_spec(names, division) for _, names in dims.operands)
    placed = [
        x if _axes(NamedSharding(mesh, spec), x.ndim) == have
        else jax.sharding.reshard(x, NamedSharding(mesh, spec))
        for x, have, spec in zip(operands, specs, wanted, strict=True)
    ]  # fmt: skip
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=wanted,
        out_specs=tuple(_spec(names, division) for names in dims.results),
        axis_names={
            x
            for x, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        },
    )
    return mapped(*placed)


@functools.cache
def _over_auto_axes(
    local: Callable[..., Arrays], dims: Dims, beside_manual: bool
) -> Callable[..., Arrays]:
    partitioned = custom_partitioning(local)
    rule, whole = dims.rule()

    def partition(mesh: jax.sharding.Mesh, args: Sequence, results: Sequence) -> tuple:
        given = [x.sharding for x in args]
        shapes = [x.shape for x in args]
        if not all(isinstance(x, NamedSharding) for x in given):
            if not beside_manual:
                raise ValueError("mesh: got shardings without axes, expected NamedSharding")
            kept = [x.sharding for x in results]
            _check_unnamed(dims, shapes, given, [x.shape for x in results], kept)
            return mesh, local, tuple(kept), tuple(given)
        specs = [_axes(x, len(shape)) for x, shape in zip(given, shapes, strict=True)]
        division = dims.divided(specs, mesh.shape)
        dims.check_even(division, shapes, mesh.shape)
        wanted = [_spec(names, division) for _, names in dims.operands]
        made = [_spec(names, division) for names in dims.results]
        return (
            mesh,
            local,
            tuple(NamedSharding(mesh, spec) for spec in made),
            tuple(NamedSharding(mesh, spec) for spec in wanted),
        )

    partitioned.def_partition(partition, sharding_rule=rule, **whole)
    return partitioned


def _check_unnamed(
    dims: Dims,
    shapes: Sequence[tuple[int, ...]],
    given: Sequence[Sharding],
    result_shapes: Sequence[tuple[int, ...]],
    made: Sequence[Sharding],
) -> None:
    """Checks shardings that name no axes, as the one Auto axis beside Manual ones gives them."""
    the_axis = "the Auto axis"
    names = [*dims.operands, *(("results", names) for names in dims.results)]
    count, specs = 1, []
    for shape, sharding in zip([*shapes, *result_shapes], [*given, *made], strict=True):
        parts = [a // max(1, b) for a, b in zip(shape, sharding.shard_shape(shape), strict=True)]
        count = max(count, *parts)
        specs.append(tuple((the_axis,) if part > 1 else () for part in parts))
    division = dims.divided(specs[: len(shapes)], {the_axis: count})
    for (name, have), spec in zip(names, specs, strict=True):
        wanted = tuple(division.get(dim, ()) for dim in have.split())
        if spec != wanted:
            raise ValueError(
                f"{name}: got [{have}] sharded over {list(map(text, spec))}, expected"
                f" {list(map(text, wanted))}, as the other operands, inside this jax.shard_map"
            )


def _axes(sharding: NamedSharding, rank: int) -> list[Axes]:
    """The mesh axes of each dimension."""
    spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    return [(x,) if isinstance(x, str) else tuple(x or ()) for x in spec]


def _spec(names: str, division: Division) -> PartitionSpec:
    axes = [division.get(dim, ()) for dim in names.split()]
    return PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in axes))
