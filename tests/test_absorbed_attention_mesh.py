"""The attention in one call over a mesh: the result of one device, no collectives."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mesh_calls
import numpy as np
import pytest
from attention_calls import HEADS, LENGTHS, SHARDED, Given, attend, call_of, specs
from attention_cases import SMALL
from jax import P
from jax.sharding import AxisType, NamedSharding
from mesh_calls import DATA, MODEL, NONE, Arrays, Call, mapped, placed
from test_mesh import COLLECTIVE, jax_gathers_at_the_border

from jax_flashmla import _dispatch, _ffi, _queries

DEVICES = 2, 4


def host_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return mesh_calls.mesh_of(DEVICES, kind, jax.local_devices(backend="cpu"))


MESHES = {kind: host_mesh(kind) for kind in (AxisType.Auto, AxisType.Explicit)}


def assert_close(got: Arrays, expected: Arrays) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("kind", mesh_calls.KINDS)
@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("name", SMALL)
def test_every_mesh_gives_the_result_of_one_device_without_collectives(
    name: str, sharded: str, kind: str
) -> None:
    """In a checked shard_map over heads the pool's result is known to be the same everywhere."""
    axis_type, meet = mesh_calls.KINDS[kind]
    mesh = MESHES[axis_type]
    call, expected = call_of(name, sharded)
    call = meet(call, mesh)
    given = placed(call, mesh)
    compiled = jax.jit(call.function).lower(*given).compile()
    if "Explicit axis" not in kind or not jax_gathers_at_the_border():
        assert COLLECTIVE.findall(compiled.as_text()) == []
    got = compiled(*given)
    assert_close(got, expected)
    for x, spec in zip(got, call.out_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("name", SMALL)
def test_two_queries_in_float16_which_has_the_one_call(name: str, sharded: str, kind: str) -> None:
    axis_type, meet = mesh_calls.KINDS[kind]
    call, expected = call_of(name, sharded, dtype="float16", s_q=2)
    call = meet(call, MESHES[axis_type])
    given = placed(call, MESHES[axis_type])
    compiled = jax.jit(call.function).lower(*given).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == []
    for x, y in zip(compiled(*given), expected, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", SMALL)
def test_varying_weights_of_heads_leave_the_pool_unvarying(name: str) -> None:
    """What a pool that counts as varying would give: the check refuses it with out_specs P()."""
    call, expected = call_of(name, "heads, the pool whole", dtype="bfloat16")
    mesh = MESHES[AxisType.Auto]

    def body(*local: jax.Array) -> Arrays:
        out, pool = attend(*local)
        assert jax.typeof(out).manual_axis_type.varying == {"model"}
        assert jax.typeof(pool).manual_axis_type.varying == frozenset()
        return out, pool

    over = mapped(dataclasses.replace(call, function=body), mesh, check_vma=True)
    got = jax.jit(over.function)(*placed(call, mesh))
    np.testing.assert_allclose(np.float32(got[1]), np.float32(expected[1]), rtol=2**-6)


CUDA_KINDS = ["Explicit", "shard_map", "shard_map, unchecked"]


@pytest.mark.parametrize("kind", CUDA_KINDS)
@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("name", SMALL)
def test_cuda_gets_one_call_of_the_local_part(
    monkeypatch: pytest.MonkeyPatch, name: str, sharded: str, kind: str
) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    axis_type, meet = mesh_calls.KINDS[kind]
    call, _ = call_of(name, sharded, dtype="bfloat16")
    call = meet(call, MESHES[axis_type])
    traced = jax.jit(call.function).trace(*placed(call, MESHES[axis_type]))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (line,) = re.findall(rf".*custom_call @{_ffi.ABSORBED_ATTENTION_TARGET}\(.*", text)
    rows = len(LENGTHS) // (2 if "batch" in sharded else 1)
    heads = HEADS // (4 if "heads" in sharded else 1)
    assert f"-> (tensor<{rows}x1x{heads}x512xbf16>, tensor<8x64x1x576xbf16>," in line
    assert set(re.findall(r"custom_call @jax_flashmla_(\w+)\(", text)) == {
        "absorbed_attention",
        "schedule",
    }


def sharded_alone(name: str, field: str, spec: P) -> Call:
    call, _ = call_of(name, "heads, the pool whole", s_q=2)
    return dataclasses.replace(call, specs=tuple(specs()._replace(**{field: spec})))


REFUSED: dict[str, tuple[Callable[[], Call], str]] = {
    "batch without its pages": (
        lambda: dataclasses.replace(
            sharded_alone("low rank", "source", DATA),
            specs=tuple(specs(DATA)._replace(kv_cache=NONE)),
        ),
        "batch sharded over data, expected pages of kv_cache sharded over the same axes",
    ),
    "pages without the batch": (
        lambda: sharded_alone("low rank", "kv_cache", DATA),
        "kv_cache: got pages sharded over data, expected batch sharded over the same axes",
    ),
    "query tokens": (
        lambda: sharded_alone("no low rank", "slots", P(None, "data")),
        ": got queries sharded over data, expected the whole on every device",
    ),
    "cached columns": (
        lambda: sharded_alone("low rank", "kv_cache", P(None, None, None, "model")),
        "kv_cache: got columns sharded over model, expected the whole on every device",
    ),
}


@pytest.mark.parametrize("axis_type", MESHES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_local_parts_cannot_give_is_refused_by_name(name: str, axis_type: AxisType) -> None:
    make, message = REFUSED[name]
    call = make()
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.jit(attend).lower(*placed(call, MESHES[axis_type])).compile()


@pytest.mark.parametrize("axis_type", MESHES)
@pytest.mark.parametrize("field", ["query_up", "side"])
def test_weights_that_are_stored_divided_are_gathered(field: str, axis_type: AxisType) -> None:
    call, expected = call_of("no low rank", "batch with its pages")
    divided = specs(DATA)._replace(**{field: P("model")})
    stored = dataclasses.replace(call, specs=tuple(divided))
    given = placed(stored, MESHES[axis_type])
    compiled = jax.jit(attend).lower(*given).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-gather"]
    assert_close(compiled(*given), expected)


@pytest.mark.parametrize("kind", mesh_calls.KINDS)
def test_rows_projected_beside_the_queries_are_the_same_where_heads_differ(kind: str) -> None:
    """As the separate steps project them where there is no low rank."""
    given, _ = call_of("no low rank", "heads, the pool whole")
    fields = dict(zip(Given._fields, given.arrays, strict=True))
    names = "source", "query_up", "key_up", "cos", "sin", "side"

    def queries(*arrays: jax.Array) -> Arrays:
        return _queries.absorbed_queries(arrays, interleave=True, implementation=None)

    in_specs = NONE, P(None, "model"), P("model"), NONE, NONE, NONE
    call = Call(queries, tuple(fields[x] for x in names), in_specs, (MODEL, MODEL, NONE))
    axis_type, meet = mesh_calls.KINDS[kind]
    met = meet(call, MESHES[axis_type])
    assert_close(jax.jit(met.function)(*placed(met, MESHES[axis_type])), call.expected())


@pytest.mark.parametrize("axis_type", MESHES)
def test_a_donated_pool_is_written_in_place(axis_type: AxisType) -> None:
    call, _ = call_of("low rank", "batch and heads")
    given = placed(call, MESHES[axis_type])
    place_of_pool = Given._fields.index("kv_cache")
    given[place_of_pool] *= 1  # a buffer of JAX's own: what came from NumPy may not be donated
    before = [x.data.unsafe_buffer_pointer() for x in given[place_of_pool].addressable_shards]
    _, pool = jax.jit(attend, donate_argnums=place_of_pool)(*given)
    assert [x.data.unsafe_buffer_pointer() for x in pool.addressable_shards] == before
    assert jnp.isfinite(pool).all()
