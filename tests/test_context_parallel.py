"""Decode over caches spread over a mesh axis: the result of one device, whatever the mesh."""

import functools
import re
from collections.abc import Callable

import context_pools
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import (
    KINDS,
    SCALE,
    Decoded,
    assert_near,
    batch,
    collectives,
    exact,
    mesh_of,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import context_parallel
from jax_flashmla.testing import cases, compare, inputs


def over_mesh(data: inputs.Inputs, mesh: jax.sharding.Mesh, **options: object) -> Decoded:
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        **({"axis_name": "context", "mesh": mesh, "softmax_scale": SCALE} | options),
    )
    return jax.jit(call)(*context_pools.operands(data, mesh.shape["context"]))


QUERIES_AND_DEVICES = (
    (1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (2, 8), (4, 1), (4, 4), (8, 2), (8, 8),
)  # fmt: skip


@pytest.mark.parametrize(("s_q", "n"), QUERIES_AND_DEVICES)
def test_float32_is_the_result_of_one_device(s_q: int, n: int) -> None:
    assert_near(over_mesh(batch(s_q), mesh_of(context=n)), truth(s_q))


@pytest.mark.parametrize(
    ("s_q", "n", "exchange"),
    [
        (1, 2, "gather"),
        (1, 8, "gather"),
        (4, 4, "gather"),
        (8, 8, "gather"),
        (4, 4, "heads"),
        (4, 4, "direct"),
    ],
)
def test_bfloat16_is_as_good_as_an_ideal_kernel(s_q: int, n: int, exchange: str) -> None:
    out, lse = over_mesh(batch(s_q, "bfloat16"), mesh_of(context=n), exchange=exchange)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    verdict = compare.compare(out, lse, truth(s_q, "bfloat16"))
    assert not verdict.faults, verdict.faults


@pytest.mark.parametrize("axis_type", KINDS)
@pytest.mark.parametrize("exchange", ["direct", "heads"])
@pytest.mark.parametrize("n", [2, 4])
def test_every_exchange_gives_the_same_result(n: int, exchange: str, axis_type: AxisType) -> None:
    assert_near(over_mesh(batch(4), mesh_of(axis_type, context=n), exchange=exchange), truth(4))


def test_without_a_mask_all_queries_see_all_keys() -> None:
    assert_near(over_mesh(batch(4), mesh_of(context=4), causal=False), truth(4, causal=False))


def test_more_queries_than_a_page_has_tokens() -> None:
    data = batch(100, h_q=1)
    assert_near(over_mesh(data, mesh_of(context=2)), exact(data))


def test_several_kv_heads() -> None:
    data = batch(2, h_q=6, h_kv=3)
    assert_near(over_mesh(data, mesh_of(context=4)), exact(data))


SMALL = cases.Shape(3, 3, 2, pages=5, pool_pages=16, dtype="float32", softmax_scale=SCALE)


@functools.cache
def small_program(n: int) -> Callable:
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="context",
        mesh=mesh_of(context=n),
        softmax_scale=SCALE,
    )
    return jax.jit(call)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.tuples(*[st.integers(-1, 320)] * 3), n=st.sampled_from([2, 4]))
def test_lengths_of_any_kind(lengths: tuple[int, ...], n: int) -> None:
    full = inputs.make_inputs(cases.Case(SMALL, "full"))
    data = inputs.Inputs(*full.arrays()[:4], jnp.asarray(lengths, jnp.int32))
    assert_near(small_program(n)(*context_pools.operands(data, n)), exact(data))


def test_lengths_beyond_the_tables_are_the_tables() -> None:
    data, mesh = batch(2), mesh_of(context=2)
    operands = list(context_pools.operands(data, 2))
    call = functools.partial(
        context_parallel.mla_decode_over_mesh, axis_name="context", mesh=mesh, softmax_scale=SCALE
    )
    operands[4] = np.where(operands[4] == 6 * 64, np.int32(2**31 - 1), operands[4])
    assert_near(jax.jit(call)(*operands), truth(2))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("axis_type", "exchange"),
    [(AxisType.Auto, "gather"), (AxisType.Auto, "direct"), (AxisType.Explicit, "heads")],
)
def test_inside_the_shard_map_of_a_user(
    axis_type: AxisType, check_vma: bool, exchange: str
) -> None:
    mesh = mesh_of(axis_type, context=4)
    pools, tables = context_pools.spread(batch(2), 4)

    def step(*arrays: jax.Array) -> Decoded:
        q_latent, q_rope, pool, table, lengths = arrays
        return context_parallel.mla_decode_context_parallel(
            *(q_latent, q_rope, pool[0], table[0], lengths),
            axis_name="context",
            softmax_scale=SCALE,
            exchange=exchange,
        )

    specs = P(), P(), P("context"), P("context"), P()
    arrays = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(
            (*batch(2).arrays()[:2], pools, tables, batch(2).cache_seqlens), specs, strict=True
        )
    ]
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    assert_near(jax.jit(mapped)(*arrays), truth(2))


@pytest.mark.parametrize("axis_type", KINDS)
def test_requests_and_heads_sharded_over_other_axes(axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type, data=2, context=2, model=2)
    data = batch(2)
    rows = slice(0, 7), slice(7, 14)
    halves = [[x if i == 2 else x[r] for i, x in enumerate(data.arrays())] for r in rows]
    spread = [context_pools.spread(inputs.Inputs(*half), 2) for half in halves]
    pools, tables = zip(*spread, strict=True)
    flat = np.concatenate(pools).reshape(-1, 64, 1, 576)  # by half of the requests, then by device
    queries = [jnp.concatenate([half[i] for half in halves]) for i in (0, 1)]
    operands = *queries, flat, np.concatenate(tables, axis=1), np.asarray(data.cache_seqlens[:14])
    specs = [P("data", None, "model")] * 2 + [
        P(("data", "context")),
        P("context", "data"),
        P("data"),
    ]
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="context",
        batch_axis="data",
        head_axis="model",
        softmax_scale=SCALE,
    )
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(operands, specs, strict=True)
        ]
        got = jax.jit(call)(*placed)
    assert got[0].sharding.spec[:3] == ("data", None, "model")
    assert_near(got, truth(2))


@pytest.mark.parametrize("axis_type", KINDS)
def test_the_mesh_of_set_mesh_is_taken(axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type, context=2)
    with jax.set_mesh(mesh):
        operands = context_pools.operands(batch(2), 2)
        pool = jax.device_put(operands[2], NamedSharding(mesh, P("context")))
        assert_near(over_mesh_of_context(*operands[:2], pool, *operands[3:]), truth(2))


@jax.jit
def over_mesh_of_context(*operands: jax.Array) -> Decoded:
    return context_parallel.mla_decode_over_mesh(
        *operands, axis_name="context", softmax_scale=SCALE
    )


@pytest.mark.parametrize("exchange", ["direct", "gather", "heads"])
def test_nothing_but_partials_travels(exchange: str) -> None:
    mesh = mesh_of(context=4)
    specs = P(), P(), P("context"), P("context"), P()
    operands = [
        jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(context_pools.operands(batch(2), 4), specs, strict=True)
    ]
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="context",
        mesh=mesh,
        softmax_scale=SCALE,
        exchange=exchange,
    )
    text = jax.jit(call).lower(*operands).compile().as_text()
    expected = {
        "direct": ["all-gather"] * 2,  # the portable lowering is that of "gather"
        "gather": ["all-gather"] * 2,
        "heads": ["all-gather"] * 2 + ["all-to-all"],
    }
    assert collectives(text) == expected[exchange]


def call_over_mesh(**changes: object) -> Decoded:
    """Traces a call with changed arrays (as shapes) or options."""
    shapes = {
        "q_latent": (3, 2, 6, 512),
        "q_rope": (3, 2, 6, 64),
        "kv_cache": (8, 64, 1, 576),
        "block_tables": (4, 3, 2),
        "cache_seqlens": (3,),
    }
    arrays = [
        jax.ShapeDtypeStruct(changes.pop(name, shape), jnp.int32 if i > 2 else jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    ]
    options = {"axis_name": "context", "mesh": mesh_of(context=4), "softmax_scale": SCALE}
    call = functools.partial(context_parallel.mla_decode_over_mesh, **options | changes)
    return jax.eval_shape(call, *arrays)


def test_a_fitting_call_traces() -> None:
    assert [x.shape for x in call_over_mesh()] == [(3, 2, 6, 512), (3, 2, 6)]


REFUSED = {
    "axis_name: got 'pages', expected one of ['context']": {"axis_name": "pages"},
    "batch_axis: got 'data', expected one of ['context']": {"batch_axis": "data"},
    "expected different axes": {"batch_axis": "context"},
    "mesh: got None without jax.set_mesh": {"mesh": None},
    "kv_cache: got 9 in dimension 0, expected a multiple of the 4": {"kv_cache": (9, 64, 1, 576)},
    "kv_cache: got shape [8, 64], expected 4 dimensions": {"kv_cache": (8, 64)},
    "kv_cache: got shape [2, 32, 1, 576], expected [num_pages, 64": {"kv_cache": (8, 32, 1, 576)},
    "block_tables: got shape [2, 3, 2], expected [4, b, max": {"block_tables": (2, 3, 2)},
    "block_tables: got shape [3, 2], expected [4, b, max": {"block_tables": (3, 2)},
    "block_table: got shape [4, 2], expected [3, max": {"block_tables": (4, 4, 2)},
    "cache_seqlens: got shape [4], expected [3]": {"cache_seqlens": (4,)},
    "exchange: got 'ring', expected one of ['direct', 'gather', 'heads']": {"exchange": "ring"},
    "exchange: got 'heads' with 6 query heads, expected a multiple of the 4": {"exchange": "heads"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named_when_traced(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call_over_mesh(**REFUSED[message])


def test_heads_need_one_kv_head() -> None:
    mesh = mesh_of(context=2, model=2)
    with pytest.raises(ValueError, match="expected one KV head"):
        call_over_mesh(
            mesh=mesh, head_axis="model", block_tables=(2, 3, 2), kv_cache=(8, 64, 2, 576)
        )


def test_outside_of_shard_map_the_axis_is_unknown() -> None:
    data = batch(2)
    with pytest.raises(ValueError, match=r"axis_name: got 'context', expected one of \[\]"):
        context_parallel.mla_decode_context_parallel(
            *data.arrays(), axis_name="context", softmax_scale=SCALE
        )


def test_a_pool_sharded_otherwise_is_refused_on_an_explicit_mesh() -> None:
    mesh = mesh_of(AxisType.Explicit, context=2, other=2)
    operands = list(context_pools.operands(batch(2), 2))
    operands[2] = jax.device_put(operands[2], NamedSharding(mesh, P("other")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"kv_cache: got sharding .*'other'"):
        over_mesh_of_context(*operands)


@pytest.mark.parametrize("sizes", [{"b": 0}, {"width": 0}, {"pages": 0}], ids=str)
def test_nothing_to_attend_gives_empty_results(sizes: dict[str, int]) -> None:
    b, width, pages = (({"b": 2, "width": 3, "pages": 4}) | sizes).values()
    zeros = functools.partial(jnp.zeros, dtype=jnp.float16)
    operands = zeros((b, 2, 4, 512)), zeros((b, 2, 4, 64)), zeros((pages, 64, 1, 576))
    rest = jnp.zeros((2, b, width), jnp.int32), jnp.ones(b, jnp.int32)
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="context",
        mesh=mesh_of(context=2),
        softmax_scale=SCALE,
    )
    out, lse = jax.jit(call)(*operands, *rest)
    np.testing.assert_array_equal(out, np.zeros((b, 2, 4, 512)))
    np.testing.assert_array_equal(lse, np.full((b, 2, 4), -np.inf))


def test_derivatives_are_refused() -> None:
    operands = [jnp.asarray(x) for x in context_pools.operands(batch(2), 2)]

    def loss(q_latent: jax.Array) -> jax.Array:
        return over_mesh_of_context(q_latent, *operands[1:])[0].sum()

    refused = pytest.raises(NotImplementedError, match="inference-only")
    with jax.set_mesh(mesh_of(context=2)), refused:
        jax.grad(loss)(operands[0])
