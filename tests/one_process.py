"""What each of several processes runs: decode with requests, then with pages, spread over all.

    python one_process.py COORDINATOR PROCESSES PROCESS RESULT.npz

On CPUs a process has the devices that XLA_FLAGS gives it, on GPUs the one of its number.

Every process builds the whole batch and hands its own devices their shares of it. RESULT.npz gets
what its devices computed, by the place of each shard, in the order of `PROGRAMS`.
"""

import functools
import os
import sys

import context_pools
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla
from jax_flashmla import context_parallel
from jax_flashmla.testing import cases, inputs

PROGRAMS = ("requests", "pages")
PARTS = 2
# By platform: portable in float32, the kernels in bfloat16.
SHAPES = {
    "cpu": cases.Shape(4, 2, 4, pages=5, pool_pages=32, dtype="float32"),
    "gpu": cases.Shape(4, 2, 64, pages=5, pool_pages=32),
}


def shape() -> cases.Shape:
    """That of the platform."""
    return SHAPES[jax.default_backend()]


def data() -> inputs.Inputs:
    """The batch, the same in every process."""
    return inputs.make_inputs(cases.Case(shape(), "around_pages"))


def over_requests(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Each device decodes its own requests; every device has the whole pool."""
    rows = P("devices")
    specs = rows, rows, P(), rows, rows
    decode = functools.partial(
        jax_flashmla.mla_decode, softmax_scale=shape().softmax_scale, num_sm_parts=PARTS
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
        softmax_scale=shape().softmax_scale,
        num_sm_parts=PARTS,
    )
    operands = context_pools.operands(data(), mesh.size)
    return jax.jit(decode)(*_global(mesh, operands, specs))


def _global(mesh: jax.sharding.Mesh, arrays: tuple, specs: tuple[P, ...]) -> list[jax.Array]:
    """Arrays over the devices of all processes, out of a copy that each process has."""

    def placed(array: jax.Array | np.ndarray, spec: P) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), host.__getitem__)

    return [placed(x, spec) for x, spec in zip(arrays, specs, strict=True)]


def main(coordinator: str, processes: int, process: int, path: str) -> None:
    """Runs both programs and writes this process's shards."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        local_device_ids=None if on_cpu else [process],
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
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
