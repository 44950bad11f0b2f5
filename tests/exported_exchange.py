"""A program of two devices with the direct exchange, and the file that keeps it as it was exported.

    JAX_NUM_CPU_DEVICES=2 python tests/exported_exchange.py    writes tests/data/exchange.jaxexport

`exported_step.py` says when: hardly ever.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import context_pools
import jax
from jax import P, export
from jax.sharding import AxisType, NamedSharding

from jax_flashmla import context_parallel, exporting
from jax_flashmla.testing import cases, inputs

DEVICES = 2
PATH = Path(__file__).parent / "data" / "exchange.jaxexport"
PLATFORMS = ("cuda",)
SHAPE = cases.Shape(3, 2, 16, pages=5, pool_pages=32)
SPECS = P(), P(), P("context"), P("context"), P()


def program(devices: Sequence[jax.Device]) -> jax.stages.Wrapped:
    """Decodes two queries each over the caches of two devices."""
    call = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="context",
        mesh=_mesh(devices),
        softmax_scale=SHAPE.softmax_scale,
        num_sm_parts=132,
        exchange="direct",
    )
    return jax.jit(call)


def arguments(devices: Sequence[jax.Device]) -> list[jax.Array]:
    """Values of the arguments, on their devices."""
    operands = context_pools.operands(inputs.make_inputs(cases.Case(SHAPE)), DEVICES)
    mesh = _mesh(devices)
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(operands, SPECS, strict=True)
    ]


def exported(devices: Sequence[jax.Device]) -> export.Exported:
    """Exports the program for CUDA alone: for several platforms at once it would be a gather."""
    checks = exporting.disabled_checks()
    make = export.export(program(devices), platforms=PLATFORMS, disabled_checks=checks)
    return make(*arguments(devices))


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    types = (AxisType.Auto,)
    return jax.make_mesh((DEVICES,), ("context",), axis_types=types, devices=devices[:DEVICES])


if __name__ == "__main__":
    PATH.write_bytes(exported(jax.devices()).serialize())
    print(f"{PATH}: {PATH.stat().st_size} bytes, JAX {jax.__version__}")
