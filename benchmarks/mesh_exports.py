"""Programs exported for CUDA on a host without a GPU, run over the devices of this one."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import context_pools
import exported_exchange
import exported_step
import jax
import mesh_calls
import mesh_equality
import numpy as np
from jax import P, export
from jax.sharding import AxisType, Mesh, NamedSharding

from jax_flashmla import context_parallel, exporting
from jax_flashmla.testing import cases, inputs

Arrays = tuple[jax.Array, ...]
PROGRAMS = ("explicit", "shard_map")
TOLERANCE = 2**-7, 1e-3  # relative, absolute: another release may round bfloat16 the other way


def make(folder: pathlib.Path, counts: Iterable[int]) -> None:
    """Writes ``explicit-N.jaxexport`` and ``shard_map-N.jaxexport`` for N devices, for CUDA."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = exporting.disabled_checks()
    for n in counts:
        for name in PROGRAMS:
            function, placed, mesh = _program(name, jax.devices()[:n])
            make_export = export.export(
                jax.jit(function), platforms=("cuda",), disabled_checks=checks
            )
            with jax.set_mesh(mesh):
                (folder / f"{name}-{n}.jaxexport").write_bytes(make_export(*placed).serialize())


def check(folder: pathlib.Path | None, devices: Sequence[jax.Device]) -> list[dict]:
    """Runs the program kept in the tests, and those of `make` for as many devices as there are."""
    entries = [_kept()]
    if len(devices) >= exported_exchange.DEVICES:
        entries.append(_kept_exchange(devices))
    for path in sorted(folder.glob("*.jaxexport")) if folder else ():
        name, n = path.stem.split("-")
        if int(n) <= len(devices):
            entries.append(_made(path, name, devices[: int(n)]))
    return entries


def _kept() -> dict:
    program = export.deserialize(exported_step.PATH.read_bytes())
    wrong, batches = [], (1, 4)
    for batch in batches:
        arguments = exported_step.arguments(batch)
        got = jax.jit(program.call)(*arguments)
        expected = jax.jit(exported_step.step)(*arguments)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        wrong += [f"batch {batch}: differs"] * (not all(_near(x, y) for x, y in pairs))
    return _entry("exported, kept in the tests", "one device", 1, len(batches), wrong)


def _kept_exchange(devices: Sequence[jax.Device]) -> dict:
    program = export.deserialize(exported_exchange.PATH.read_bytes())
    arguments = exported_exchange.arguments(devices)
    got, expected = (
        jax.jit(program.call)(*arguments),
        exported_exchange.program(devices)(*arguments),
    )
    wrong = [] if all(_near(x, y) for x, y in zip(got, expected, strict=True)) else ["differs"]
    return _entry("exported, kept in the tests", "shard_map", exported_exchange.DEVICES, 1, wrong)


def _made(path: pathlib.Path, name: str, devices: Sequence[jax.Device]) -> dict:
    program = export.deserialize(path.read_bytes())
    function, placed, mesh = _program(name, devices)
    with jax.set_mesh(mesh):
        got, expected = jax.jit(program.call)(*placed), jax.jit(function)(*placed)
    same = all(mesh_equality.same_bits(x, y) for x, y in zip(got, expected, strict=True))
    wrong = [] if same else ["other bits than the program compiled here"]
    return _entry("exported for CUDA on a host without GPU", name, len(devices), 1, wrong)


def _entry(what: str, kind: str, devices: int, total: int, wrong: list[str]) -> dict:
    passed = total - len(wrong)
    counts = {"devices": devices, "passed": passed, "total": total}
    return {"what": what, "kind": kind, **counts, "wrong": wrong}


def _program(
    name: str, devices: Sequence[jax.Device]
) -> tuple[Callable[..., Arrays], list[jax.Array], Mesh]:
    """A function, its operands and their mesh: decode of sharded requests, or of spread pages."""
    n = len(devices)
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Explicit,), devices=devices)
    if name == "explicit":
        sizes = mesh_calls.Sizes(batch=4, heads=16, shards=n, dtype="bfloat16")
        call = mesh_calls.calls(sizes)["decode, pool with the batch"]
        specs = P("data"), P("data"), P("data"), P("data"), P("data")
        return call.function, _placed(call.arrays, specs, mesh), mesh
    shape = cases.Shape(3, 2, 16, pages=5, pool_pages=16, softmax_scale=mesh_calls.SCALE)
    data = inputs.make_inputs(cases.Case(shape, "around_pages"))
    function = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="data",
        mesh=mesh,
        softmax_scale=shape.softmax_scale,
    )
    specs = P(), P(), P("data"), P("data"), P()
    return function, _placed(context_pools.operands(data, n), specs, mesh), mesh


def _placed(arrays: Sequence, specs: Sequence[P], mesh: Mesh) -> list[jax.Array]:
    pairs = zip(arrays, specs, strict=True)
    return [jax.device_put(np.asarray(x), NamedSharding(mesh, spec)) for x, spec in pairs]


def _near(x: jax.Array, y: jax.Array) -> bool:
    relative, absolute = TOLERANCE
    return x.dtype == y.dtype and np.allclose(np.float32(x), np.float32(y), relative, absolute)
