"""Context-parallel decode that leaves each device with its own heads."""

import functools
import re
from collections.abc import Callable

import context_pools
import jax
import pytest
from context_cases import KINDS, SCALE, Decoded, assert_near, batch, collectives, mesh_of, truth
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import context_parallel
from jax_flashmla.testing import inputs


def own_heads_program(
    data: inputs.Inputs, exchange: str, axis_type: AxisType = AxisType.Auto
) -> tuple[Callable, list[jax.Array]]:
    """Over 4 devices, and its operands."""
    specs = P(), P(), P("context"), P("context"), P()
    heads = P(None, None, "context", None), P(None, None, "context")
    mesh = mesh_of(axis_type, context=4)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=heads)
    def decode(
        q_latent: jax.Array, q_rope: jax.Array, pool: jax.Array, tables: jax.Array, *rest: jax.Array
    ) -> Decoded:
        return context_parallel.mla_decode_context_parallel(
            *(q_latent, q_rope, pool, tables[0], *rest),
            axis_name="context",
            softmax_scale=SCALE,
            exchange=exchange,
            own_heads=True,
        )

    operands = zip(context_pools.operands(data, 4), specs, strict=True)
    return jax.jit(decode), [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in operands]


@pytest.mark.parametrize("axis_type", KINDS)
@pytest.mark.parametrize("exchange", ["direct", "gather", "heads"])
def test_each_device_may_have_its_own_heads_alone(exchange: str, axis_type: AxisType) -> None:
    program, operands = own_heads_program(batch(4), exchange, axis_type)
    assert_near(program(*operands), truth(4))


def test_own_heads_take_one_collective() -> None:
    program, operands = own_heads_program(batch(2), "heads")
    text = program.lower(*operands).compile().as_text()
    assert collectives(text) == ["all-to-all"]


def test_own_heads_of_an_empty_batch() -> None:
    program, operands = own_heads_program(batch(1), "gather")
    q_latent, q_rope, pools, tables, lengths = operands
    empty = q_latent[:0], q_rope[:0], pools, tables[:, :0], lengths[:0]
    assert [x.shape for x in program(*empty)] == [(0, 1, 4, 512), (0, 1, 4)]


def test_own_heads_are_whole_ones() -> None:
    program, operands = own_heads_program(batch(2, h_q=6, h_kv=3), "gather")
    message = "own_heads: got True with 6 query heads, expected a multiple of the 4 devices"
    with pytest.raises(ValueError, match=re.escape(message)):
        program(*operands)
