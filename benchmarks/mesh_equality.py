"""Whether the ops over a mesh give what one device gives.

Two comparisons. "bits": each device's part of a result has the bits that one device alone gives for
that device's part of the operands (the same splits), and results without splits those of the whole
operands. "float64": a decode is as near to the exact result as the tests ask for.
"""

import concurrent.futures
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import attention_calls
import attention_cases
import context_pools
import exchange_partials
import jax
import jax.numpy as jnp
import measure
import mesh_calls
import numpy as np
import script
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from jax_flashmla import _exchange, context_parallel
from jax_flashmla.testing import cases, checking, inputs, query_oracle

SIZES = mesh_calls.Sizes(batch=8, heads=64, pages=16, rows=16, dtype="bfloat16")
CONTEXT = cases.Shape(6, 2, 64, pages=9, pool_pages=64, softmax_scale=mesh_calls.SCALE)
OVER_CONTEXT = {"axis_name": "context", "softmax_scale": mesh_calls.SCALE}
ON_ALL_MESHES = ("Auto", "Explicit", "shard_map")
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Check:
    """A program over a mesh and what is asked of its results.

    Attributes:
        what: Names the kind of check in the results.
        kind: Of the mesh.
        function: To be compiled.
        operands: On the mesh.
        faults: Says what is wrong with results.
    """

    what: str
    kind: str
    function: Callable[..., Arrays]
    operands: Sequence[jax.Array]
    faults: Callable[[Arrays], list[str]]


def check(devices: Sequence[jax.Device]) -> list[dict]:
    """Checks every op, sharding and kind of mesh on these devices.

    Returns:
        One entry per op and kind of mesh: how many checks, how many passed, what was wrong.
    """
    checks = [*_ops(devices), *_attention(devices), *_context(devices), *_direct(devices)]
    with concurrent.futures.ThreadPoolExecutor(measure.COMPILE_THREADS) as threads:
        ready = list(threads.map(_compiled, checks))
    entries: dict[tuple[str, str], dict] = defaultdict(lambda: {"total": 0, "wrong": []})
    for each, run in script.progress(
        zip(checks, ready, strict=True), len(checks), f"checks on {len(devices)}"
    ):
        entry = entries[each.what, each.kind]
        entry["total"] += 1
        entry["wrong"] += each.faults(run(*each.operands))[:1]
    return [
        {
            "what": what,
            "kind": kind,
            "devices": len(devices),
            "passed": entry["total"] - len(entry["wrong"]),
            **entry,
        }
        for (what, kind), entry in entries.items()
    ]


def _compiled(check: Check) -> jax.stages.Compiled:
    return jax.jit(check.function).lower(*check.operands).compile()


def _ops(devices: Sequence[jax.Device]) -> Iterator[Check]:
    n = len(devices)
    shapes = [(n, 1), (1, n)] + ([(2, n // 2)] if n > 2 else [])
    for shape in shapes:
        sizes = dataclasses.replace(SIZES, shards=shape[0])
        both = shape == shapes[-1]
        for name, call in mesh_calls.calls(sizes).items():
            if not _divided(call, shape):
                continue
            for kind, (axis_type, meet) in mesh_calls.KINDS.items():
                if kind in ON_ALL_MESHES or both:
                    mesh = mesh_calls.mesh_of(shape, axis_type, devices)
                    over = meet(call, mesh)
                    operands = mesh_calls.placed(over, mesh)
                    faults = functools.partial(_op_faults, call, operands)
                    yield Check(name, kind, over.function, operands, faults)
        for kind in ("Auto", "Explicit") if shape[0] > 1 else ():
            mesh = mesh_calls.mesh_of(shape, mesh_calls.KINDS[kind][0], devices)
            lengths = np.resize(np.int32([0, 70, 192, 1, 4000]), 64)
            call = mesh_calls.Call(mesh_calls.schedule, (lengths,), (P("data"),), (P(), P()))
            faults = functools.partial(_whole_faults, call)
            yield Check("schedule", kind, call.function, mesh_calls.placed(call, mesh), faults)


def _divided(call: mesh_calls.Call, shape: tuple[int, int]) -> bool:
    """Whether a mesh of that shape divides any operand."""
    used = {axis for spec in (*call.specs, *call.out_specs) for axis in spec}
    return any(size > 1 and axis in used for axis, size in zip(mesh_calls.AXES, shape, strict=True))


def _op_faults(call: mesh_calls.Call, operands: Sequence[jax.Array], got: Arrays) -> list[str]:
    faults = _part_faults(call, operands, got)
    if call.function in (mesh_calls.decode, mesh_calls.decode_with_schedule):
        return faults + _decode_faults(call, got)
    if call.function is mesh_calls.absorbed_queries:  # fewer heads are divided among more blocks
        return faults + _query_faults(call, got)
    return faults if call.function is mesh_calls.flash else faults + _whole_faults(call, got)


def _part_faults(call: mesh_calls.Call, operands: Sequence[jax.Array], got: Arrays) -> list[str]:
    """Compares each device's part of the results with one device's results for its operands."""
    one = jax.devices()[0]
    faults = []
    for device in got[0].sharding.device_set:
        alone = _one_device(call.function)(
            *(jax.device_put(_part(x, device), one) for x in operands)
        )
        parts = [_part(x, device) for x in got]
        if not all(same_bits(x, y) for x, y in zip(parts, alone, strict=True)):
            faults.append(f"{device}: other bits than one device alone")
    return faults


def _whole_faults(call: mesh_calls.Call, got: Arrays) -> list[str]:
    whole = _one_device(call.function)(*call.whole())
    same = all(same_bits(x, y) for x, y in zip(got, whole, strict=True))
    return [] if same else ["other bits than one device for the whole"]


def _decode_faults(call: mesh_calls.Call, got: Arrays) -> list[str]:
    q_latent, _, pool, table, _ = arrays = call.whole()
    batch, queries, heads, _ = q_latent.shape
    shape = cases.Shape(
        *(batch, queries, heads, pool.shape[2], table.shape[1], len(pool)),
        softmax_scale=mesh_calls.SCALE,
    )
    return judged(got, inputs.Inputs(*map(jnp.asarray, arrays)), shape)


def _query_faults(call: mesh_calls.Call, got: Arrays) -> list[str]:
    arrays = dict(zip(query_oracle.OPERANDS, call.whole(), strict=False))
    faults = query_oracle.faults(got, arrays, interleave=False)
    return [f"{faults} elements too far off"] if faults else []


def judged(got: Arrays, data: inputs.Inputs, shape: cases.Shape) -> list[str]:
    """What is wrong with a decode, by the tests' tolerances."""
    on_one = tuple(jnp.asarray(np.asarray(x)) for x in got)
    return list(checking.judge(on_one, data, shape).faults)


def _attention(devices: Sequence[jax.Device]) -> Iterator[Check]:
    """A layer's attention in one call, with queries of low rank and without."""
    n = len(devices)
    for sharded in attention_calls.SHARDED:
        shape = (2, n // 2) if "batch" in sharded else (1, n)
        for model in attention_cases.SMALL:
            call, expected = attention_calls.call_of(model, sharded, dtype="bfloat16", s_q=2)
            for kind, (axis_type, meet) in mesh_calls.KINDS.items():
                mesh = mesh_calls.mesh_of(shape, axis_type, devices)
                over = meet(call, mesh)
                operands = mesh_calls.placed(over, mesh)
                faults = functools.partial(_attention_faults, call, expected, operands)
                yield Check(f"attention, {sharded}", kind, over.function, operands, faults)


def _attention_faults(
    call: mesh_calls.Call, expected: Arrays, operands: Sequence[jax.Array], got: Arrays
) -> list[str]:
    """Fewer heads are divided among more blocks, fewer requests among other parts."""
    close = all(
        np.allclose(np.float32(x), np.float32(y), rtol=2**-6, atol=2**-6)
        for x, y in zip(got, expected, strict=True)
    )
    faults = _part_faults(call, operands, got)
    return faults if close else [*faults, "far from one device for the whole"]


def _context(devices: Sequence[jax.Device]) -> Iterator[Check]:
    """Context parallelism by every exchange, inside a shard_map also of each device's own heads."""
    n = len(devices)
    for s_q in (1, 2):
        shape = dataclasses.replace(CONTEXT, s_q=s_q)
        data = inputs.make_inputs(cases.Case(shape, "around_pages"))
        operands, faults = context_pools.operands(data, n), _context_faults(data, shape)
        for kind, (axis_type, _) in list(mesh_calls.KINDS.items())[:3]:
            mesh = jax.make_mesh((n,), ("context",), axis_types=(axis_type,), devices=devices)
            specs = P(), P(), P("context"), P("context"), P()
            placed = [
                jax.device_put(x, NamedSharding(mesh, spec))
                for x, spec in zip(operands, specs, strict=True)
            ]
            for exchange in _exchange.EXCHANGES:
                function = _context_function(kind, mesh, specs, exchange)
                what = f"context parallel, {exchange}"
                yield Check(what, kind, function, placed, faults)
            if kind == "shard_map":
                judge = functools.partial(judged, data=data, shape=shape)
                for exchange in _exchange.EXCHANGES:
                    function = _inside_shard_map(mesh, specs, exchange, own_heads=True)
                    yield Check(f"own heads, {exchange}", kind, function, placed, judge)


def _context_function(
    kind: str, mesh: Mesh, specs: tuple[P, ...], exchange: str
) -> Callable[..., Arrays]:
    if kind == "shard_map":
        return _inside_shard_map(mesh, specs, exchange, own_heads=False)
    return functools.partial(
        context_parallel.mla_decode_over_mesh, mesh=mesh, exchange=exchange, **OVER_CONTEXT
    )


def _inside_shard_map(
    mesh: Mesh, specs: tuple[P, ...], exchange: str, *, own_heads: bool
) -> Callable[..., Arrays]:
    def local(*arrays: jax.Array) -> Arrays:
        q_latent, q_rope, pool, tables, lengths = arrays
        return context_parallel.mla_decode_context_parallel(
            *(q_latent, q_rope, pool, tables[0], lengths),
            exchange=exchange,
            own_heads=own_heads,
            **OVER_CONTEXT,
        )

    out = P(None, None, "context") if own_heads else P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)


def _context_faults(data: inputs.Inputs, shape: cases.Shape) -> Callable[[Arrays], list[str]]:
    def faults(got: Arrays) -> list[str]:
        return judged(got, data, shape) + _differing(got)

    return faults


def _differing(got: Arrays) -> list[str]:
    same = [same_bits(x.addressable_data(0), y.data) for x in got for y in x.addressable_shards]
    return [] if all(same) else ["devices differ in their bits"]


def _direct(devices: Sequence[jax.Device]) -> Iterator[Check]:
    """The direct exchange of random partials: one round and two, one row and more than warps."""
    n, on_gpu = len(devices), devices[0].platform == "gpu"
    mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Explicit,), devices=devices)
    over = NamedSharding(mesh, P("context"))
    function = functools.partial(_exchanged, mesh=mesh, implementation="cuda" if on_gpu else None)
    for k, rows in ((1, 1), (1, 70), (2, 33), (3, 1100), (2, 2048), (1, 5000)):
        for dtype in ("bfloat16", "float16"):
            partials = exchange_partials.draw(n, k, rows, dtype)
            operands = [jax.device_put(x, over) for x in partials]
            faults = functools.partial(_exchange_faults, *partials)
            yield Check("exchange, direct", "Explicit", function, operands, faults)


def _exchanged(
    outs: jax.Array, lses: jax.Array, *, mesh: Mesh, implementation: str | None
) -> Arrays:
    """Eight exchanges, each with lses of its own, so that a slot that was not renewed shows."""

    def local(outs: jax.Array, lses: jax.Array) -> Arrays:
        results = [
            _exchange.merge_over(
                *(outs[0], lses[0] + i),
                axis_name="context",
                exchange="direct",
                implementation=implementation,
            )
            for i in range(8)
        ]
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))

    specs = P("context"), P("context")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None))
    return mapped(outs, lses)


def _exchange_faults(outs: np.ndarray, lses: np.ndarray, got: Arrays) -> list[str]:
    """Every repetition is held against float64, every device against the first."""
    found = _differing(got)
    for i, pair in enumerate(zip(*got, strict=True)):
        if wrong := exchange_partials.wrong(outs, lses + np.float32(i), pair):
            found.append(f"{wrong} elements of exchange {i} are wrong")
    return found


@functools.cache
def _one_device(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    return jax.jit(function)


def _part(array: jax.Array, device: jax.Device) -> jax.Array:
    return next(x.data for x in array.addressable_shards if x.device == device)


def same_bits(x: jax.Array, y: jax.Array) -> bool:
    """Whether two arrays are the same, NaN and signs of zeros included."""
    a, b = np.asarray(x), np.asarray(y)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
