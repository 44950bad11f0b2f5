"""Compiles programs with the ops against a persistent compilation cache, in a process of its own.

    python cached_programs.py CACHE_FOLDER RESULT.json

RESULT.json gets, for each program, how often the cache had it and had it not, and a digest of what
is lowered for CUDA. The cache's key is made of the lowered program and of what compiles it.
"""

import collections
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import context_pools
import jax
from jax import P, export, monitoring
from jax.sharding import AxisType, NamedSharding

import jax_flashmla
from jax_flashmla import context_parallel, exporting
from jax_flashmla.testing import cases, inputs

DEVICES = 4
SHAPE = cases.Shape(4, 2, 16, pages=3, pool_pages=16)
EVENTS = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}
Program = tuple[Callable, tuple]

decode = functools.partial(
    jax_flashmla.mla_decode, softmax_scale=SHAPE.softmax_scale, num_sm_parts=5
)


def batch() -> tuple[jax.Array, ...]:
    return inputs.make_inputs(cases.Case(SHAPE)).arrays()


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def placed(mesh: jax.sharding.Mesh, arrays: tuple, specs: tuple[P, ...]) -> tuple:
    pairs = zip(arrays, specs, strict=True)
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs)


def plain() -> Program:
    return decode, batch()


ROWS = P("data"), P("data"), P(), P("data"), P("data")


def explicit() -> Program:
    return decode, placed(mesh_of(AxisType.Explicit), batch(), ROWS)


def mapped() -> Program:
    mesh = mesh_of(AxisType.Auto)
    over = jax.shard_map(decode, mesh=mesh, in_specs=ROWS, out_specs=P("data"))
    return over, placed(mesh, batch(), ROWS)


def context() -> Program:
    mesh = mesh_of(AxisType.Auto)
    over = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="data",
        mesh=mesh,
        softmax_scale=SHAPE.softmax_scale,
        num_sm_parts=5,
    )
    operands = context_pools.operands(inputs.make_inputs(cases.Case(SHAPE)), DEVICES)
    return over, placed(mesh, operands, (P(), P(), P("data"), P("data"), P()))


def exported() -> Program:
    function, arrays = plain()
    checks = exporting.disabled_checks()
    once = export.export(jax.jit(function), platforms=("cpu", "cuda"), disabled_checks=checks)
    return export.deserialize(once(*arrays).serialize()).call, arrays


PROGRAMS = {
    "plain": plain,
    "explicit": explicit,
    "shard_map": mapped,
    "context": context,
    "exported": exported,
}


def main(folder: str, path: str) -> None:
    """Compiles each program once."""
    counted: collections.Counter[str] = collections.Counter()
    monitoring.register_event_listener(lambda event, **_: counted.update([event]))
    found = {}
    for name, make in PROGRAMS.items():
        function, arrays = make()
        # On from here: what makes the operands is compiled too, and is not asked about.
        jax.config.update("jax_compilation_cache_dir", folder)
        before = counted.copy()
        traced = jax.jit(function).trace(*arrays)
        traced.lower().compile()
        cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
        found[name] = {what: counted[event] - before[event] for event, what in EVENTS.items()}
        found[name]["cuda"] = hashlib.sha256(cuda.encode()).hexdigest()
        jax.config.update("jax_compilation_cache_dir", None)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    main(*sys.argv[1:])
