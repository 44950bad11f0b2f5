"""Programs exported on a host without a GPU: symbolic batch, both platforms, meshes, old files."""

import functools
import re
from collections.abc import Callable
from types import ModuleType

import context_pools
import exported_exchange
import exported_layer
import exported_projected
import exported_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import _dispatch, cache, context_parallel, exporting, mla
from jax_flashmla.testing import cases, inputs, query_oracle

SHAPE = cases.Shape(4, 2, 4, pages=3, pool_pages=16)
SCALE = SHAPE.softmax_scale
STABLE_TARGETS = {
    "jax_flashmla_schedule",
    "jax_flashmla_decode",
    "jax_flashmla_append",
    "jax_flashmla_gather",
    "jax_flashmla_merge",
}
STABLE_TARGETS_OF_EXCHANGE = {
    "jax_flashmla_schedule",
    "jax_flashmla_decode",
    "jax_flashmla_address",
    "jax_flashmla_exchange",
}

STABLE_TARGETS_OF_PROJECTED = {"jax_flashmla_append_projected"}
STABLE_TARGETS_OF_LAYER = {
    "jax_flashmla_schedule",
    "jax_flashmla_absorbed_queries",
    "jax_flashmla_absorbed_attention",
}

decode = functools.partial(jax_flashmla.mla_decode, softmax_scale=SCALE, num_sm_parts=5)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)


def round_trip(function: Callable, *shapes: object, platforms: tuple = ("cpu", "cuda")) -> tuple:
    checks = exporting.disabled_checks()
    once = export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*shapes)
    again = export.deserialize(once.serialize())
    assert again.platforms == platforms
    return again


def targets(exported: export.Exported) -> set[str]:
    return set(re.findall(r"custom_call @(jax_flashmla_\w+)", exported.mlir_module()))


def assert_same(got: object, expected: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y), strict=True)


def assert_near(got: object, expected: object) -> None:
    """For programs that another release compiles: bfloat16 may be rounded the other way."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2**-7, atol=1e-3)


def described(arrays: tuple, symbolic: tuple[int, ...], names: str) -> list[jax.ShapeDtypeStruct]:
    """Shapes of arrays; where one has a dimension listed, it becomes the name in that place."""
    bounds = [exporting.MAX_SYMBOLIC_BATCH] + (["p <= 1000"] if "p" in names else [])
    dims = dict(zip(symbolic, export.symbolic_shape(names, constraints=bounds), strict=True))
    return [jax.ShapeDtypeStruct([dims.get(d, d) for d in x.shape], x.dtype) for x in arrays]


def batch_of(size: int) -> tuple[jax.Array, ...]:
    shape = cases.Shape(size, 2, 4, pages=8, pool_pages=40)
    return inputs.make_inputs(cases.Case(shape)).arrays()


def rows(size: int) -> tuple[jax.Array, ...]:
    """A pool of five pages and new rows for it: cache, latent, rope, slots, cos, sin."""
    rng = np.random.default_rng(size)
    half = [jnp.asarray(rng.standard_normal((size, d)), jnp.bfloat16) for d in (512, 64)]
    slots = jnp.asarray(rng.permutation(320)[:size], jnp.int32)
    angles = [jnp.asarray(rng.standard_normal((size, 32)), jnp.float32) for _ in range(2)]
    return jnp.zeros((5, 64, 1, 576), jnp.bfloat16), *half, slots, *angles


def partials(size: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(size)
    outs = jnp.asarray(rng.standard_normal((3, size, 2, 512)), jnp.bfloat16)
    return outs, jnp.asarray(rng.standard_normal((3, size, 2)), jnp.float32)


def hidden(size: int) -> tuple[jax.Array, ...]:
    arrays = query_oracle.random_arrays(query_oracle.Sizes(size, 2, 128, 3, 128), "bfloat16")
    return tuple(map(jnp.asarray, query_oracle.operands(arrays)))


def metadata(cache_seqlens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax_flashmla.get_mla_metadata(cache_seqlens, 8, 1, num_sm_parts=5)


def append(pool: jax.Array, *rest: jax.Array) -> jax.Array:
    *arrays, cos, sin = rest
    return cache.append(pool, *arrays, cos=cos, sin=sin)


PROGRAMS = {
    "decode": (decode, batch_of),
    "schedule": (metadata, lambda size: batch_of(size)[4:]),
    "append": (append, rows),
    "gather": (cache.gather, lambda size: batch_of(size)[2:]),
    "merge": (jax_flashmla.merge_partials, partials),
    "absorbed_queries": (mla.absorbed_queries, hidden),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_symbolic_batch_runs_at_any_size(name: str) -> None:
    function, arguments = PROGRAMS[name]
    exported = round_trip(function, *described(arguments(11), (11,), "b"))
    assert f"jax_flashmla_{name}" in targets(exported)
    for size in (1, 3):
        assert_same(exported.call(*arguments(size)), jax.jit(function)(*arguments(size)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_for_cuda_alone_nothing_but_the_custom_calls_is_left(name: str) -> None:
    function, arguments = PROGRAMS[name]
    exported = round_trip(function, *described(arguments(11), (11,), "b"), platforms=("cuda",))
    expected = {f"jax_flashmla_{name}"} | ({"jax_flashmla_schedule"} if name == "decode" else set())
    assert targets(exported) == expected
    assert "stablehlo.dot" not in exported.mlir_module()


def test_pages_and_table_may_be_symbolic_too() -> None:
    exported = round_trip(decode, *described(batch_of(11), (11, 8, 40), "b, 8*w, p"))
    assert_same(exported.call(*batch_of(2)), jax.jit(decode)(*batch_of(2)))
    q_latent, q_rope, pool, table, lengths = batch_of(2)
    wider = q_latent, q_rope, jnp.pad(pool, ((0, 3), *[(0, 0)] * 3)), jnp.tile(table, 2), lengths
    assert_same(exported.call(*wider), jax.jit(decode)(*wider))


def test_for_cuda_tables_may_have_any_width() -> None:
    shapes = described(batch_of(11), (11, 8, 40), "b, w, p")
    exported = round_trip(decode, *shapes, platforms=("cuda",))
    assert targets(exported) == {"jax_flashmla_schedule", "jax_flashmla_decode"}


def test_a_batch_without_bound_goes_to_cuda() -> None:
    (b,) = export.symbolic_shape("b")
    lengths = jax.ShapeDtypeStruct((b,), jnp.int32)
    assert targets(round_trip(metadata, lengths, platforms=("cuda",))) == {"jax_flashmla_schedule"}


def test_targets_are_those_of_exported_programs() -> None:
    of_one_device = STABLE_TARGETS | STABLE_TARGETS_OF_PROJECTED | STABLE_TARGETS_OF_LAYER
    assert set(exporting.TARGETS) == of_one_device | STABLE_TARGETS_OF_EXCHANGE


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    devices = jax.local_devices(backend="cpu")[:4]
    return jax.make_mesh((4,), ("devices",), axis_types=(axis_type,), devices=devices)


def over_requests(mesh: jax.sharding.Mesh) -> tuple[Callable, tuple, tuple]:
    spread = P("devices")
    specs = spread, spread, P(), spread, spread
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=spread)
    return mapped, specs, inputs.make_inputs(cases.Case(SHAPE)).arrays()


def over_pages(mesh: jax.sharding.Mesh) -> tuple[Callable, tuple, tuple]:
    specs = P(), P(), P("devices"), P("devices"), P()
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="devices",
        mesh=mesh,
        softmax_scale=SCALE,
        num_sm_parts=5,
    )
    return call, specs, context_pools.operands(inputs.make_inputs(cases.Case(SHAPE)), 4)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("program", [over_requests, over_pages])
def test_shard_map_over_a_mesh(program: Callable, axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type)
    function, specs, arrays = program(mesh)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    exported = round_trip(function, *placed)
    assert exported.nr_devices == 4
    assert {"jax_flashmla_schedule", "jax_flashmla_decode"} <= targets(exported)
    assert_same(jax.jit(exported.call)(*placed), jax.jit(function)(*placed))


def test_decode_over_explicit_axes() -> None:
    mesh = mesh_of(AxisType.Explicit)
    _, specs, arrays = over_requests(mesh)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
        ]
        exported = round_trip(decode, *placed)
        assert exported.nr_devices == 4
        assert_same(jax.jit(exported.call)(*placed), jax.jit(decode)(*placed))


def test_over_auto_axes_is_refused_by_name() -> None:
    mesh = mesh_of(AxisType.Auto)
    _, specs, arrays = over_requests(mesh)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    expected = "export: got jax_flashmla over Auto axes of a mesh of 4 devices, .* jax.shard_map"
    with pytest.raises(ValueError, match=expected):
        round_trip(decode, *placed)
    jax.jit(decode).lower(*placed).compile()  # other programs are not refused


def test_beside_manual_axes_an_auto_axis_is_refused_too() -> None:
    devices = jax.local_devices(backend="cpu")[:4]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    _, specs, arrays = over_requests(mesh_of(AxisType.Auto))
    over_a = [P("a") if spec else P() for spec in specs]
    mapped = jax.shard_map(
        lambda *x: decode(*x), mesh=mesh, in_specs=tuple(over_a), out_specs=P("a"), axis_names={"a"}
    )
    with pytest.raises(ValueError, match="export: got jax_flashmla over Auto axes"):
        round_trip(mapped, *arrays)


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (exported_step, STABLE_TARGETS),
        (exported_projected, STABLE_TARGETS_OF_PROJECTED),
        (exported_layer, STABLE_TARGETS_OF_LAYER),
    ],
)
def test_the_kept_program_still_runs(program: ModuleType, wanted: set[str]) -> None:
    kept = export.deserialize(program.PATH.read_bytes())
    assert kept.platforms == program.PLATFORMS
    assert targets(kept) == wanted
    for batch in (1, 4):
        arguments = program.arguments(batch)
        assert_near(kept.call(*arguments), jax.jit(program.step)(*arguments))


def test_the_kept_program_of_two_gpus_is_what_would_be_exported_today() -> None:
    kept = export.deserialize(exported_exchange.PATH.read_bytes())
    today = exported_exchange.exported(jax.local_devices(backend="cpu"))
    assert (kept.platforms, kept.nr_devices) == (exported_exchange.PLATFORMS, 2)
    assert targets(kept) == STABLE_TARGETS_OF_EXCHANGE
    assert signatures(kept) == signatures(today)


def test_for_several_platforms_the_direct_exchange_is_a_gather() -> None:
    mesh = mesh_of(AxisType.Explicit)
    function, specs, arrays = over_pages(mesh)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    direct = functools.partial(function, exchange="direct")
    exported = round_trip(direct, *placed)
    assert targets(exported) == {f"jax_flashmla_{x}" for x in ("schedule", "decode", "merge")}
    assert_same(jax.jit(exported.call)(*placed), jax.jit(function)(*placed))


@pytest.mark.parametrize("program", [exported_step, exported_projected, exported_layer])
def test_the_kept_program_is_what_would_be_exported_today(program: ModuleType) -> None:
    kept, today = export.deserialize(program.PATH.read_bytes()), program.exported()
    assert kept.in_tree == today.in_tree
    assert kept.out_tree == today.out_tree
    assert len(signatures(kept)) >= len(targets(kept))
    assert signatures(kept) == signatures(today)


def signatures(exported: export.Exported) -> set[tuple[str, ...]]:
    """Target, attributes and types of each custom call."""
    text = exported.mlir_module()
    found = re.finditer(
        r"custom_call @(jax_flashmla_\w+)\(.*?(backend_config = {.*?}).* : (.*)", text
    )
    return {(x[1], x[2], re.sub(r" loc\(.*", "", x[3])) for x in found}
