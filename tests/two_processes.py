"""What each of two processes runs: decode with requests, then with pages, spread over both.

    python two_processes.py COORDINATOR PROCESS_ID RESULT.npz

with LOCAL_DEVICES devices each.

Every process builds the whole batch and hands its own devices their shares of it. RESULT.npz gets
what its devices computed, by the place of each shard, in the order of `PROGRAMS`.
"""

import functools
import sys

import context_pools
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import context_parallel
from jax_flashmla.testing import cases, inputs

PROCESSES, LOCAL_DEVICES = 2, 2
PROGRAMS = ("requests", "pages")
SHAPE = cases.Shape(4, 2, 4, pages=5, pool_pages=32, dtype="float32")


def data() -> inputs.Inputs:
    """The batch, the same in every process."""
    return inputs.make_inputs(cases.Case(SHAPE, "around_pages"))


def over_requests(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Each device decodes its own requests; every device has the whole pool."""
    rows = P("devices")
    specs = rows, rows, P(), rows, rows
    decode = functools.partial(
        jax_flashmla.mla_decode, softmax_scale=SHAPE.softmax_scale, num_sm_parts=2
    )
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=rows)
    return jax.jit(mapped)(*_global(mesh, data().arrays(), specs))


def over_pages(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Each device attends to its own pages of all requests."""
    specs = P(), P(), P("devices"), P("devices"), P()
    decode = functools.partial(
        context_parallel.mla_decode_over_mesh,
        axis_name="devices",
        mesh=mesh,
        softmax_scale=SHAPE.softmax_scale,
        num_sm_parts=2,
    )
    operands = context_pools.operands(data(), mesh.size)
    return jax.jit(decode)(*_global(mesh, operands, specs))


def _global(mesh: jax.sharding.Mesh, arrays: tuple, specs: tuple[P, ...]) -> list[jax.Array]:
    """Arrays over the devices of all processes, out of a copy that each process has."""

    def placed(array: jax.Array | np.ndarray, spec: P) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), host.__getitem__)

    return [placed(x, spec) for x, spec in zip(arrays, specs, strict=True)]


def main(coordinator: str, process: int, path: str) -> None:
    """Runs both programs and writes this process's shards."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        PROCESSES,
        process,
        initialization_timeout=60,
        cluster_detection_method="deactivate",
    )
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    found = {}
    for name, program in zip(PROGRAMS, (over_requests, over_pages), strict=True):
        for result, array in zip(("out", "lse"), program(mesh), strict=True):
            for shard in array.addressable_shards:
                begin = shard.index[0].start or 0
                found[f"{name}/{result}/{begin}/{shard.device.id}"] = np.asarray(shard.data)
    np.savez(path, devices=jax.device_count(), **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
