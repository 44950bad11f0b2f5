"""Schedules of a context-parallel step, made once for all its layers."""

from collections.abc import Callable

import context_pools
import jax
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import jax_flashmla
from jax_flashmla import _dispatch, context_parallel
from jax_flashmla.testing import cases, inputs

TOLERANCE = 2e-5
SCALE = 0.07
CPUS = jax.local_devices(backend="cpu")
SPECS = P(), P(), P("context"), P("context"), P()


def make_batch(s_q: int, dtype: str = "float32") -> inputs.Inputs:
    shape = cases.Shape(6, s_q, 4, pages=5, pool_pages=40, dtype=dtype, softmax_scale=SCALE)
    return inputs.make_inputs(cases.Case(shape, "around_pages"))


def layers(n: int, s_q: int, *, shared: bool, scan: bool, made_for: int | None = None) -> Callable:
    """Three decodes inside a shard_map, each with the last one's out as its query.

    Args:
        n: devices.
        s_q: queries.
        shared: whether they share schedules.
        scan: whether they are a loop.
        made_for: queries that shared schedules are made for, `s_q` where it is None.
    """

    def step(*arrays: jax.Array) -> jax.Array:
        q_latent, q_rope, pool, tables, lengths = arrays
        given = None
        if shared:
            given = context_parallel.get_schedules(
                tables[0],
                lengths,
                axis_name="context",
                s_q=made_for or s_q,
                h_q=q_latent.shape[2],
                num_sm_parts=3,
            )
        options = {"axis_name": "context", "softmax_scale": SCALE, "schedules": given}
        parts = None if shared else 3

        def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
            arrays = q, q_rope, pool, tables[0], lengths
            call = context_parallel.mla_decode_context_parallel
            return call(*arrays, num_sm_parts=parts, **options)[0], None

        if scan:
            return jax.lax.scan(layer, q_latent, length=3)[0]
        for _ in range(3):
            q_latent, _ = layer(q_latent, None)
        return q_latent

    mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,), devices=CPUS[:n])
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=SPECS, out_specs=P()))


@pytest.mark.parametrize(("s_q", "scan"), [(1, False), (1, True), (4, True)])
def test_layers_may_share_schedules(s_q: int, scan: bool) -> None:
    operands = context_pools.operands(make_batch(s_q), 4)
    got, expected = (layers(4, s_q, shared=x, scan=scan)(*operands) for x in (True, False))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("s_q", "count"), [(1, 1), (4, 2)])
def test_shared_schedules_are_made_once(
    s_q: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    operands = context_pools.operands(make_batch(s_q, "bfloat16"), 4)
    for shared in (True, False):
        traced = layers(4, s_q, shared=shared, scan=False).trace(*operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        made = text.count("custom_call @jax_flashmla_schedule")
        assert made == (count if shared else 3 * count)


def test_schedules_of_other_queries_are_refused() -> None:
    operands = context_pools.operands(make_batch(4), 4)
    expected = "schedules: got 1, expected the 2 that get_schedules returns"
    with pytest.raises(ValueError, match=expected):
        layers(4, 4, shared=True, scan=False, made_for=1).trace(*operands)


def test_schedules_need_the_axis() -> None:
    table, lengths = (np.asarray(x) for x in make_batch(1).arrays()[3:])
    with pytest.raises(ValueError, match="axis_name: got 'context', expected one of"):
        context_parallel.get_schedules(table, lengths, axis_name="context", s_q=1, h_q=4)


def test_schedules_are_those_of_each_devices_share() -> None:
    _, _, _, tables, lengths = context_pools.operands(make_batch(1), 4)
    options = {"axis_name": "context", "s_q": 1, "h_q": 4, "num_sm_parts": 3}
    mapped = jax.shard_map(
        lambda x, y: context_parallel.get_schedules(x[0], y, **options)[0],
        mesh=jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=CPUS[:4]),
        in_specs=(P("context"), P()),
        out_specs=P("context"),
    )
    got = jax.jit(mapped)(tables, lengths)
    shares = context_parallel.split_seqlens(lengths, 4)
    expected = [jax_flashmla.get_mla_metadata(x, 4, 1, num_sm_parts=3) for x in shares]
    for x, y in zip(got, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(x, np.concatenate(y))
