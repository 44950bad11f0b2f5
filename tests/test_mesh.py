"""The ops over a mesh: the result of one device, no collectives, and named errors."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P
from jax.sharding import AxisType, NamedSharding

import jax_flashmla
from jax_flashmla import _dispatch, cache

Arrays = tuple[jax.Array, ...]

COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)
DEVICES = 2, 4
BATCH, QUERIES, HEADS, PAGES = 4, 2, 8, 8
LENGTHS = np.int32([0, 70, 192, 1])
NONE, DATA, MODEL = P(), P("data"), P(None, None, "model")
BOTH = P("data", None, "model")

decode = functools.partial(jax_flashmla.mla_decode, softmax_scale=0.1)


def decode_with_schedule(*arrays: jax.Array) -> Arrays:
    schedule = jax_flashmla.get_mla_metadata(arrays[4], QUERIES * HEADS, 1, num_sm_parts=3)
    return decode(*arrays, schedule=schedule)


def flash(*arrays: jax.Array) -> Arrays:
    return jax_flashmla.flash_mla_with_kvcache(*arrays, 512, None, None)


def gather(*arrays: jax.Array) -> Arrays:
    return (cache.gather(*arrays),)


def append(*arrays: jax.Array) -> Arrays:
    rotation = dict(zip(("cos", "sin"), arrays[4:], strict=bool(arrays[4:])))
    return (cache.append(*arrays[:4], **rotation),)


@dataclasses.dataclass(frozen=True)
class Call:
    """An op on whole arrays, how they are sharded, and the shardings of the results.

    `paged` is the position of the table or the slots, which name pages of the device where the
    pool is sharded.
    """

    function: Callable[..., Arrays]
    arrays: tuple[np.ndarray, ...]
    specs: tuple[P, ...]
    out_specs: tuple[P, ...]
    paged: int | None = None

    def expected(self) -> Arrays:
        """The result on one device, whose table names pages of the whole pool."""
        arrays = list(self.arrays)
        if self.paged is not None:
            indices = arrays[self.paged]
            pages = self.arrays[2 if self.function is decode else 0].shape[0] // DEVICES[0]
            size = pages * (64 if self.function is append else 1)
            second = np.arange(len(indices)) >= len(indices) // 2
            arrays[self.paged] = indices + size * np.int32(second).reshape(
                -1, *[1] * (indices.ndim - 1)
            )
        return self.function(*arrays)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def decode_arrays(batch: int = BATCH, heads: int = HEADS, h_kv: int = 1) -> Arrays:
    rows = batch, QUERIES, heads
    table = np.random.default_rng(1).integers(0, PAGES // 2, (batch, 3), np.int32)
    lengths = np.resize(LENGTHS, batch)
    return normal(*rows, 512), normal(*rows, 64), normal(PAGES, 64, h_kv, 576), table, lengths


def append_arrays(rows: int = 6) -> Arrays:
    slots = np.int32([3, 255, -1, 64, 7, 130] * (rows // 6))
    rotation = normal(rows, 32), normal(rows, 32)
    return normal(PAGES, 64, 1, 576), normal(rows, 512), normal(rows, 64), slots, *rotation


JOINED = np.concatenate(decode_arrays()[:2], axis=-1)
PARTIALS = normal(3, BATCH, HEADS, 32), normal(3, BATCH, HEADS)
KV_HEADS = decode_arrays(h_kv=4)
HEADS_OF = MODEL, MODEL, P(None, None, "model"), NONE, NONE
CALLS = {
    "decode, batch": Call(
        decode, decode_arrays(), (DATA, DATA, NONE, DATA, DATA), (DATA, P("data"))
    ),
    "decode, heads": Call(decode, decode_arrays(), (MODEL, MODEL, NONE, NONE, NONE), (MODEL,) * 2),
    "decode, batch and heads": Call(
        decode, decode_arrays(), (BOTH, BOTH, NONE, DATA, DATA), (BOTH,) * 2
    ),
    "decode, scheduled before": Call(
        decode_with_schedule, decode_arrays(), (BOTH, BOTH, NONE, DATA, DATA), (BOTH,) * 2
    ),
    "decode, pool with the batch": Call(
        decode, decode_arrays(), (BOTH, BOTH, DATA, DATA, DATA), (BOTH,) * 2, paged=3
    ),
    "decode, KV heads": Call(decode, KV_HEADS, HEADS_OF, (MODEL,) * 2),
    "decode, FlashMLA's form": Call(
        flash, (JOINED, *decode_arrays()[2:]), (BOTH, NONE, DATA, DATA), (BOTH, P("data", "model"))
    ),
    "gather, batch": Call(gather, decode_arrays()[2:], (NONE, DATA, DATA), (DATA,)),
    "gather, KV heads": Call(gather, KV_HEADS[2:], (MODEL, DATA, DATA), (BOTH,)),
    "gather, pool with the batch": Call(
        gather, decode_arrays()[2:], (DATA, DATA, DATA), (DATA,), paged=1
    ),
    "append, one pool": Call(append, append_arrays()[:4], (NONE,) * 4, (NONE,)),
    "append, pool with the rows": Call(append, append_arrays(), (DATA,) * 6, (DATA,), paged=3),
    "merge": Call(
        jax_flashmla.merge_partials,
        PARTIALS,
        (P(None, "data", "model"),) * 2,
        (P("data", "model"),) * 2,
    ),
}


def host_mesh(*kinds: AxisType) -> jax.sharding.Mesh:
    devices = jax.local_devices(backend="cpu")
    return jax.make_mesh(DEVICES, ("data", "model"), axis_types=kinds, devices=devices)


AUTO = host_mesh(AxisType.Auto, AxisType.Auto)
EXPLICIT = host_mesh(AxisType.Explicit, AxisType.Explicit)


def placed(call: Call, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    pairs = zip(call.arrays, call.specs, strict=True)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]


def only(axis: str, specs: tuple[P, ...]) -> tuple[P, ...]:
    return tuple(P(*(x if x == axis else None for x in spec)) for spec in specs)


def mapped(call: Call, mesh: jax.sharding.Mesh, axis: str | None = None, **options: bool) -> Call:
    """The call inside a shard_map over all axes, or one."""
    specs, out_specs = call.specs, call.out_specs
    if axis:
        specs, out_specs, options["axis_names"] = only(axis, specs), only(axis, out_specs), {axis}

    def function(*arrays: jax.Array) -> Arrays:
        return tuple(call.function(*arrays))

    over = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, **options)
    return dataclasses.replace(call, function=over)


MESHES = {
    "Auto": lambda call: (call, AUTO),
    "Explicit": lambda call: (call, EXPLICIT),
    "shard_map": lambda call: (mapped(call, AUTO), AUTO),
    "shard_map, unchecked": lambda call: (mapped(call, AUTO, check_vma=False), AUTO),
    "shard_map over one Explicit axis": lambda call: (mapped(call, EXPLICIT, "data"), EXPLICIT),
    "shard_map over one Auto axis": lambda call: (mapped(call, AUTO, "data"), AUTO),
}


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
MANY += ["append, pool with the rows", "merge"]
PAIRS = [(x, y) for x in CALLS for y in MESHES if x in MANY or y in ("Auto", "Explicit")]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_mesh_gives_the_result_of_one_device_without_collectives(
    name: str, kind: str
) -> None:
    call, mesh = MESHES[kind](CALLS[name])
    arrays = placed(call, mesh)
    compiled = jax.jit(call.function).lower(*arrays).compile()
    if "Explicit axis" not in kind or not jax_gathers_at_the_border():
        assert COLLECTIVE.findall(compiled.as_text()) == []
    got = compiled(*arrays)
    assert_close(got, CALLS[name].expected())
    for x, spec in zip(got, call.out_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["decode, batch and heads", "append, pool with the rows"])
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
    call = Call(decode, decode_arrays(), (BOTH, NONE, NONE, NONE, DATA), (BOTH,) * 2)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        arrays = placed(call, mesh)
        compiled = jax.jit(call.function).lower(*arrays).compile()
        assert COLLECTIVE.findall(compiled.as_text()) == []
        assert_close(compiled(*arrays), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_a_schedule_is_of_the_whole_batch(mesh: jax.sharding.Mesh) -> None:
    def schedule(lengths: jax.Array) -> Arrays:
        return tuple(jax_flashmla.get_mla_metadata(lengths, 16, 1, num_sm_parts=3))

    call = Call(schedule, (LENGTHS,), (DATA,), (NONE, NONE))
    compiled = jax.jit(schedule).lower(*placed(call, mesh)).compile()
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-gather"]  # of the lengths
    assert_close(compiled(*placed(call, mesh)), call.expected())


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
def test_vmap_over_a_mesh(mesh: jax.sharding.Mesh) -> None:
    q_latent, q_rope, *rest = decode_arrays()
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
    arrays = decode_arrays(batch, heads, h_kv)
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
            CALLS["merge"], arrays=tuple(x[:2] for x in PARTIALS), specs=(DATA, DATA)
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

    arrays = decode_arrays(heads=6)
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
    text = jax.jit(decode).lower(*decode_arrays()).as_text()
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
