"""A direct exchange to which one of two GPUs does not come, in a process with a patience of 1 s.

Two in one program, both with GPU 0 alone, which waits once. Prints how long that took.
"""

import os
import time

os.environ["JAX_FLASHMLA_EXCHANGE_PATIENCE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jax_flashmla import _direct_exchange

OPTIONS = {"axis_name": "context", "implementation": "cuda"}
MESH = jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])


def two_alone(outs: jax.Array, lses: jax.Array) -> jax.Array:
    boxes = _direct_exchange.get_mailboxes(lses.size, **OPTIONS)

    def merged(lses: jax.Array) -> jax.Array:
        return _direct_exchange.merge_over(outs, lses, boxes, **OPTIONS)[1]

    def both(lses: jax.Array) -> jax.Array:
        return jnp.stack([merged(lses), merged(lses + 1)])

    present = jax.lax.axis_index("context") == 0
    return jax.lax.cond(present, both, lambda x: jnp.stack([x[0], x[0]]), lses)[None]


def main() -> None:
    outs, lses = jnp.ones((1, 5000, 512), jnp.bfloat16), jnp.zeros((1, 5000))
    mapped = jax.shard_map(
        two_alone, mesh=MESH, in_specs=(P(), P()), out_specs=P("context"), check_vma=False
    )
    run = jax.jit(mapped).lower(outs, lses).compile()
    begin = time.perf_counter()
    got = np.asarray(run(outs, lses))
    seconds = time.perf_counter() - begin
    assert np.isnan(got[0]).all(), "GPU 0 should have got NaN"
    assert (got[1] == 0).all(), "GPU 1 made no exchange"
    assert float(jnp.ones((64, 64)).sum()) == 4096, "the GPU still works"
    print(f"waited {seconds:.2f} s")


if __name__ == "__main__":
    main()
