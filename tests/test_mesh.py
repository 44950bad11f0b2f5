"""The ops over a mesh: the result of one device, no collectives, and named errors."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import mesh_calls
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P
from jax.sharding import AxisType, NamedSharding
from mesh_calls import (
    BOTH,
    DATA,
    KINDS,
    MODEL,
    NONE,
    Arrays,
    Call,
    Sizes,
    decode,
    decode_arrays,
    mapped,
    placed,
)

from jax_flashmla import _dispatch

COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)
SIZES = Sizes()
CALLS = mesh_calls.calls(SIZES)
DEVICES = SIZES.shards, 4
LENGTHS = CALLS["decode, batch"].arrays[4]


def host_mesh(*kinds: AxisType) -> jax.sharding.Mesh:
    devices = jax.local_devices(backend="cpu")
    return jax.make_mesh(DEVICES, mesh_calls.AXES, axis_types=kinds, devices=devices)


AUTO = host_mesh(AxisType.Auto, AxisType.Auto)
EXPLICIT = host_mesh(AxisType.Explicit, AxisType.Explicit)


def on_mesh(name: str, kind: str) -> tuple[Call, jax.sharding.Mesh]:
    """A call as it meets a kind of mesh, and the mesh."""
    axis_type, meet = mesh_calls.KINDS[kind]
    mesh = AUTO if axis_type == AxisType.Auto else EXPLICIT
    return meet(CALLS[name], mesh), mesh


def assert_close(got: Arrays, expected: Arrays) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, strict=True)


@functools.cache
def jax_gathers_at_the_border() -> bool:
    """JAX 0.10 gathers over the other Explicit axes wherever a shard_map over one begins."""
    first = dataclasses.replace(CALLS["merge"], function=lambda outs, lses: (outs[0], lses[0]))
    call = mapped(first, EXPLICIT, "data")
    text = jax.jit(call.function).lower(*placed(call, EXPLICIT)).compile().as_text()
    return bool(COLLECTIVE.search(text))


MANY = ["decode, batch and heads", "decode, pool with the batch", "gather, KV heads"]
MANY += ["append, pool with the rows", "absorbed_queries, batch and heads", "merge"]
PAIRS = [(x, y) for x in CALLS for y in KINDS if x in MANY or y in ("Auto", "Explicit")]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_mesh_gives_the_result_of_one_device_without_collectives(
    name: str, kind: str
) -> None:
    call, mesh = on_mesh(name, kind)
    arrays = placed(call, mesh)
    compiled = jax.jit(call.function).lower(*arrays).compile()
    if "Explicit axis" not in kind or not jax_gathers_at_the_border():
        assert COLLECTIVE.findall(compiled.as_text()) == []
    got = compiled(*arrays)
    assert_close(got, CALLS[name].expected())
    for x, spec in zip(got, call.out_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name",
    ["decode, batch and heads", "append, pool with the rows", "absorbed_queries, batch and heads"],
)
def test_outside_of_jit(name: str, mesh: jax.sharding.Mesh) -> None:
    call = CALLS[name]
    got = call.function(*placed(call, mesh))
    assert_close(got, call.expected())
    wanted = NamedSharding(mesh, call.out_specs[0])
    assert got[0].sharding.is_equivalent_to(wanted, got[0].ndim)


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_operands_that_are_not_sharded_are_divided_as_the_others(
    mesh: jax.sharding.Mesh, set_mesh: bool
) -> None:
    call = Call(decode, decode_arrays(SIZES), (BOTH, NONE, NONE, NONE, DATA), (BOTH,) * 2)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        arrays = placed(call, mesh)
        compiled = jax.jit(call.function).lower(*arrays).compile()
        assert COLLECTIVE.findall(compiled.as_text()) == []
        assert_close(compiled(*arrays), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_weights_that_are_stored_divided_are_gathered(mesh: jax.sharding.Mesh) -> None:
    call = CALLS["absorbed_queries, batch"]
    stored = dataclasses.replace(call, specs=(DATA, P("model"), NONE, DATA, DATA))
    compiled = jax.jit(call.function).lower(*placed(stored, mesh)).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-gather"]  # of query_up
    assert_close(compiled(*placed(stored, mesh)), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_a_schedule_is_of_the_whole_batch(mesh: jax.sharding.Mesh) -> None:
    call = Call(mesh_calls.schedule, (LENGTHS,), (DATA,), (NONE, NONE))
    compiled = jax.jit(call.function).lower(*placed(call, mesh)).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-gather"]  # of the lengths
    assert_close(compiled(*placed(call, mesh)), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_vmap_over_a_mesh(mesh: jax.sharding.Mesh) -> None:
    q_latent, q_rope, *rest = decode_arrays(SIZES)
    queries = np.stack([q_latent, -q_latent]), np.stack([q_rope, -q_rope])
    over = jax.vmap(decode, (0, 0, None, None, None))
    heads = P(None, None, None, "model")
    call = Call(over, (*queries, *rest), (heads, heads, NONE, NONE, NONE), (heads, heads))
    compiled = jax.jit(over).lower(*placed(call, mesh)).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []
    assert_close(compiled(*placed(call, mesh)), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_shape_that_divides_evenly(mesh: jax.sharding.Mesh, data: st.DataObject) -> None:
    batch = 2 * data.draw(st.integers(1, 4))
    h_kv = data.draw(st.sampled_from([1, 4, 8]))
    heads = h_kv * data.draw(st.integers(1, 2)) * (4 if h_kv == 1 else 1)
    pool = P(None, None, "model" if h_kv > 1 else None)
    arrays = decode_arrays(Sizes(batch, heads=heads, kv_heads=h_kv))
    call = Call(decode, arrays, (BOTH, BOTH, pool, DATA, DATA), (BOTH,) * 2)
    assert_close(jax.jit(decode)(*placed(call, mesh)), call.expected())


COLUMNS = P(None, None, None, "model")
REFUSED = {
    "pool without the batch": (
        dataclasses.replace(CALLS["decode, heads"], specs=(MODEL, MODEL, DATA, NONE, NONE)),
        "kv_cache: got pages sharded over data, expected batch sharded over the same axes",
    ),
    "pool over another axis than the batch": (
        dataclasses.replace(CALLS["decode, batch"], specs=(DATA, DATA, P("model"), DATA, DATA)),
        "kv_cache: got pages sharded over model, expected batch .*, not over data",
    ),
    "latent columns": (
        dataclasses.replace(CALLS["decode, heads"], specs=(COLUMNS, NONE, NONE, NONE, NONE)),
        "q_latent: got latent sharded over model, expected the whole on every device",
    ),
    "pool columns": (
        dataclasses.replace(CALLS["gather, batch"], specs=(COLUMNS, NONE, NONE)),
        "cache: got columns sharded over model, expected the whole on every device",
    ),
    "query tokens": (
        dataclasses.replace(
            CALLS["decode, batch"], specs=(P(None, "data"), NONE, NONE, NONE, NONE)
        ),
        "q_latent: got queries sharded over data, expected the whole on every device",
    ),
    "query heads without their KV heads": (
        dataclasses.replace(CALLS["decode, KV heads"], specs=(MODEL, MODEL, NONE, NONE, NONE)),
        "q_latent: got heads sharded over model, expected kv_heads of kv_cache sharded over",
    ),
    "operands that disagree": (
        dataclasses.replace(CALLS["decode, batch"], specs=(DATA, DATA, NONE, P("model"), NONE)),
        "block_table: got batch sharded over model, expected data, as in q_latent",
    ),
    "pool without the rows": (
        dataclasses.replace(CALLS["append, one pool"], specs=(DATA, NONE, NONE, NONE)),
        "cache: got pages sharded over data, expected rows sharded over the same axes",
    ),
    "rows without the pool": (
        dataclasses.replace(CALLS["append, one pool"], specs=(NONE, DATA, DATA, DATA)),
        "latent: got rows sharded over data, expected pages of cache sharded over the same axes",
    ),
    "partials": (
        dataclasses.replace(
            CALLS["merge"], arrays=tuple(x[:2] for x in CALLS["merge"].arrays), specs=(DATA, DATA)
        ),
        "outs: got partials sharded over data, expected the whole on every device",
    ),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_local_parts_cannot_give_is_refused_by_name(name: str, kind: str) -> None:
    call, message = REFUSED[name]
    if kind == "Explicit":
        with pytest.raises(ValueError, match=message):
            jax.jit(call.function).trace(*placed(call, EXPLICIT))
    else:
        lowered = jax.jit(call.function).lower(*placed(call, AUTO))
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            lowered.compile()


def test_uneven_shards_are_refused_by_name() -> None:
    def constrained(q_latent: jax.Array, *rest: jax.Array) -> Arrays:
        heads = NamedSharding(AUTO, MODEL)
        return decode(jax.lax.with_sharding_constraint(q_latent, heads), *rest)

    arrays = decode_arrays(Sizes(heads=6))
    call = Call(constrained, arrays, (NONE,) * 5, (NONE,) * 2)
    with pytest.raises(
        (ValueError, jax.errors.JaxRuntimeError), match=r"6 heads sharded over model.*4 devices"
    ):
        jax.jit(constrained).lower(*placed(call, AUTO)).compile()


@pytest.mark.parametrize(
    "kinds", [(AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)]
)
def test_a_mesh_of_both_kinds_is_refused_by_name(kinds: tuple[AxisType, ...]) -> None:
    mesh = host_mesh(*kinds)
    with pytest.raises(ValueError, match=r"mesh: got Auto axes .* beside .* over all axes"):
        jax.jit(decode).trace(*placed(CALLS["decode, batch and heads"], mesh))


def test_refusal_inside_a_shard_map_over_one_axis() -> None:
    call = dataclasses.replace(CALLS["decode, batch"], specs=(DATA, DATA, COLUMNS, DATA, DATA))
    over = mapped(call, AUTO, "data")
    with pytest.raises(jax.errors.JaxRuntimeError, match="kv_cache: got columns sharded over the"):
        jax.jit(over.function).lower(*placed(call, AUTO)).compile()


def test_cuda_gets_calls_of_the_local_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    call = CALLS["decode, batch and heads"]
    half = [x.astype(jnp.bfloat16) if x.dtype == np.float32 else x for x in call.arrays]
    arrays = placed(dataclasses.replace(call, arrays=tuple(half)), EXPLICIT)
    text = jax.jit(decode).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = re.findall(r".*custom_call @jax_flashmla_decode\(.*", text)
    assert "tensor<2x2x2x512xbf16>, tensor<2x2x2x64xbf16>, tensor<8x64x1x576xbf16>" in line
    # 132 SMs for the 4 rows of a device: the number of parts is that of its own heads.
    assert "tensor<132x8xi32>" in line


def test_one_device_is_lowered_without_the_partitioner() -> None:
    text = jax.jit(decode).lower(*decode_arrays(SIZES)).as_text()
    assert "CustomSPMDPartitioning" not in text
    lowered = jax.jit(decode).lower(*placed(CALLS["decode, heads"], AUTO)).as_text()
    assert "CustomSPMDPartitioning" in lowered


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_a_donated_pool_is_appended_to_in_place(mesh: jax.sharding.Mesh) -> None:
    call = CALLS["append, pool with the rows"]
    arrays = placed(call, mesh)
    arrays[0] *= 1  # a buffer of JAX's own: what came from NumPy may not be donated
    before = [x.data.unsafe_buffer_pointer() for x in arrays[0].addressable_shards]
    (got,) = jax.jit(call.function, donate_argnums=0)(*arrays)
    assert [x.data.unsafe_buffer_pointer() for x in got.addressable_shards] == before
