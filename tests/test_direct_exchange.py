"""The direct exchange on CPUs: its lowering for CUDA, its mailboxes, what it refuses."""

import functools
import re
from collections.abc import Callable

import context_pools
import exchange_partials
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, export
from jax.sharding import AxisType

from jax_flashmla import _direct_exchange, _dispatch, _exchange, context_parallel, exporting
from jax_flashmla.testing import cases, inputs

SCALE = 0.07
CPUS = jax.local_devices(backend="cpu")
SPECS = P(), P(), P("context"), P("context"), P()
OPTIONS = {"axis_name": "context", "softmax_scale": SCALE, "exchange": "direct"}
ADDRESS, EXCHANGE = "jax_flashmla_address", "jax_flashmla_exchange"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)


def make_batch(s_q: int = 1, dtype: str = "bfloat16", h_q: int = 4) -> inputs.Inputs:
    shape = cases.Shape(6, s_q, h_q, pages=5, pool_pages=40, dtype=dtype, softmax_scale=SCALE)
    return inputs.make_inputs(cases.Case(shape, "around_pages"))


def mesh_of(n: int, axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((n,), ("context",), axis_types=(axis_type,), devices=CPUS[:n])


def layers(n: int, *, rows: dict[str, int] | None, scan: bool = False) -> Callable:
    """Three decodes inside a shard_map, over mailboxes for `rows`, or each with its own."""

    def step(*arrays: jax.Array) -> jax.Array:
        q_latent, *rest, tables, lengths = arrays
        boxes = rows and context_parallel.get_mailboxes(axis_name="context", **rows)

        def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            call = context_parallel.mla_decode_context_parallel
            return call(q, *rest, tables[0], lengths, mailboxes=boxes, **OPTIONS)[0], None

        if scan:
            return jax.lax.scan(layer, q_latent, length=3)[0]
        for _ in range(3):
            q_latent, _ = layer(q_latent, None)
        return q_latent

    return jax.jit(jax.shard_map(step, mesh=mesh_of(n), in_specs=SPECS, out_specs=P()))


def lowered(function: Callable, *arrays: object) -> str:
    return function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    """The custom calls of the exchange and the collectives, in their order."""
    names = rf"custom_call @({ADDRESS}|{EXCHANGE})|stablehlo\.(all_\w+)"
    return [x or y for x, y in re.findall(names, text)]


@pytest.mark.parametrize(("s_q", "partials"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_nothing_but_addresses_is_gathered(axis_type: AxisType, s_q: int, partials: int) -> None:
    mesh = mesh_of(4, axis_type)
    over = functools.partial(context_parallel.mla_decode_over_mesh, mesh=mesh, **OPTIONS)
    text = lowered(jax.jit(over), *context_pools.operands(make_batch(s_q), 4))
    assert calls(text) == [ADDRESS, "all_gather", EXCHANGE]
    assert re.search(r"all_gather.*\(tensor<1x8xui32>\) -> tensor<4x8xui32>", text)
    rows = 6 * s_q * 4
    assert f"rows = {partials * rows} : i32" in text
    kinds = rf"tensor<{partials}x{rows}x512xbf16>, tensor<{partials}x{rows}xf32>, tensor<4x8xui32>"
    assert re.search(rf"@{EXCHANGE}\(.*\({kinds}\) -> \(tensor<{rows}x512xbf16>", text)


@pytest.mark.parametrize("scan", [False, True])
def test_layers_may_share_mailboxes(scan: bool) -> None:
    operands = context_pools.operands(make_batch(), 4)
    own, shared = (layers(4, rows=x, scan=scan) for x in (None, {"b": 8, "s_q": 1, "h_q": 4}))
    np.testing.assert_array_equal(*(np.float32(x(*operands)) for x in (own, shared)))
    text = lowered(shared, *operands)
    assert calls(text) == [ADDRESS, "all_gather", *[EXCHANGE] * (1 if scan else 3)]
    opened = text.index(ADDRESS)
    assert not scan or opened < text.index("stablehlo.while")


def test_mailboxes_of_several_queries_have_room_for_both_parts() -> None:
    operands = context_pools.operands(make_batch(4), 4)
    assert "rows = 192" in lowered(layers(4, rows={"b": 6, "s_q": 4, "h_q": 4}), *operands)


def test_mailboxes_that_are_too_small_are_refused() -> None:
    step = layers(4, rows={"b": 5, "s_q": 1, "h_q": 4})
    expected = "mailboxes: got some for 20 partial rows, expected 24: those of get_mailboxes"
    with pytest.raises(ValueError, match=expected):
        step.trace(*context_pools.operands(make_batch(), 4))


def test_mailboxes_for_more_rows_than_an_exchange_can_have() -> None:
    operands = context_pools.operands(make_batch(), 2)
    text = lowered(layers(2, rows={"b": 16385, "s_q": 1, "h_q": 4}), *operands)
    assert "rows = 65536 : i32" in text
    assert calls(text) == [ADDRESS, "all_gather", *[EXCHANGE] * 3]


def test_mailboxes_need_the_axis_and_counts() -> None:
    counts = {"b": 1, "s_q": 1, "h_q": 4}
    with pytest.raises(ValueError, match="axis_name: got 'context', expected one of"):
        context_parallel.get_mailboxes(axis_name="context", **counts)
    with pytest.raises(ValueError, match="b: got 0, expected"):
        layers(2, rows=counts | {"b": 0}).trace(*context_pools.operands(make_batch(), 2))


def merge(outs: jax.Array, lses: jax.Array, **options: object) -> tuple[jax.Array, jax.Array]:
    """The exchange alone, over all leading devices: `[n, k, ..., 512]` and `[n, k, ...]`."""

    def local(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _direct_exchange.merge_over(
            *(outs[0], lses[0], None),
            **{"axis_name": "context", "implementation": None} | options,
        )

    specs = P("context"), P("context")
    mesh = mesh_of(len(outs))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(outs, lses)


PORTABLE = {
    "float32 has no kernel": ((2, 1, 3, 512), "float32"),
    "d = 64 is not 512": ((2, 1, 3, 64), "bfloat16"),
    "131072 partial rows are more than 65536": ((2, 2, 65536, 512), "bfloat16"),
}


@pytest.mark.parametrize("reason", PORTABLE)
def test_what_has_no_kernel_is_gathered_or_refused(reason: str) -> None:
    shape, dtype = PORTABLE[reason]
    arrays = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], "float32")
    with pytest.warns(UserWarning, match=reason):
        found = calls(lowered(jax.jit(merge), *arrays))
    assert EXCHANGE not in found
    assert found.count("all_gather") >= 2
    with pytest.raises(ValueError, match=f"implementation: got 'cuda', which cannot run: {reason}"):
        jax.eval_shape(functools.partial(merge, implementation="cuda"), *arrays)


def test_processes_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    arrays = jnp.ones((2, 1, 3, 512), jnp.bfloat16), jnp.ones((2, 1, 3))
    with pytest.raises(ValueError, match="2 processes cannot write into each other's memory"):
        jax.eval_shape(functools.partial(merge, implementation="cuda"), *arrays)


def test_at_most_sixteen_devices() -> None:
    _exchange.check("direct", h_q=4, n=16)
    with pytest.raises(ValueError, match="exchange: got 'direct' over 17 devices, expected at mo"):
        _exchange.check("direct", h_q=4, n=17)


def test_empty_partials_and_vmap() -> None:
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((2, 3, 2, 5, 512)).astype(np.float32)  # [n, mapped, k, rows, 512]
    lses = rng.standard_normal((2, 3, 2, 5)).astype(np.float32)
    outs[1, :, 0, 2], lses[1, :, 0, 2] = np.nan, -np.inf
    outs[:, :, :, 4], lses[:, :, :, 4] = np.nan, -np.inf
    out, lse = jax.vmap(merge, in_axes=1)(outs, lses)
    assert (out.shape, lse.shape) == ((3, 5, 512), (3, 5))
    for i in range(3):
        for got, expected in zip((out[i], lse[i]), merge(outs[:, i], lses[:, i]), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert not np.isnan(out).any()
    assert np.isneginf(lse[:, 4]).all()


def test_beside_an_auto_axis_it_is_refused() -> None:
    mesh = jax.make_mesh((2, 2), ("context", "other"), axis_types=(AxisType.Auto,) * 2)

    def local(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
        options = {"axis_name": "context", "implementation": None}
        return _direct_exchange.merge_over(outs[0], lses[0], None, **options)

    specs = P("context"), P("context")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"context"}, check_vma=False
    )
    with pytest.raises(
        ValueError, match=r"exchange: got 'direct' beside the Auto axes \['other'\]"
    ):
        jax.jit(mapped)(jnp.ones((2, 1, 3, 512)), jnp.ones((2, 1, 3)))


def test_beside_explicit_axes_each_device_merges_its_rows() -> None:
    types = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("context", "data"), axis_types=types, devices=CPUS[:4])
    partials = exchange_partials.draw(2, 2, 6, "bfloat16")

    def local(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
        options = {"axis_name": "context", "implementation": None}
        return _direct_exchange.merge_over(outs[0], lses[0], None, **options)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, P("context", None, "data")) for x in partials]
        specs = P("context"), P("context")
        mapped = jax.jit(
            jax.shard_map(local, in_specs=specs, out_specs=P(), axis_names={"context"})
        )
        got = mapped(*placed)
        text = lowered(mapped, *placed)
    assert [x.sharding.spec[0] for x in got] == ["data", "data"]
    assert exchange_partials.wrong(*partials, got) == 0
    assert re.search(rf"@{EXCHANGE}\(.*\(tensor<2x3x512xbf16>, tensor<2x3xf32>", text)


def test_an_open_batch_is_gathered() -> None:
    (b,) = export.symbolic_shape("b", constraints=[exporting.MAX_SYMBOLIC_BATCH])
    arrays = context_pools.operands(make_batch(), 2)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in arrays]
    for i, dimension in ((0, 0), (1, 0), (3, 1), (4, 0)):
        sizes = list(shapes[i].shape)
        sizes[dimension] = b
        shapes[i] = jax.ShapeDtypeStruct(sizes, shapes[i].dtype)
    over = functools.partial(context_parallel.mla_decode_over_mesh, mesh=mesh_of(2), **OPTIONS)
    exported = export.export(
        jax.jit(over), platforms=("cuda",), disabled_checks=exporting.disabled_checks()
    )(*shapes)
    assert EXCHANGE not in exported.mlir_module()
