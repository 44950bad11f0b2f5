"""Prints, as JSON, the device memory that one decode step of a stack of layers takes."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

import dense_stack

from jax_flashmla import cache, mla

PAGES, BATCH = 8192, 4  # of each layer: 1.8 GB in three layers


def main() -> None:
    """Runs one step in bfloat16, the pool donated, the layers in a scan."""
    hf = dense_stack.hf_config("deepseek_v3")
    config = mla.MLAConfig.from_hf(hf)
    weights = dense_stack.load(dense_stack.random_tensors(hf), hf, jnp.bfloat16)
    table = jnp.arange(BATCH * 4, dtype=jnp.int32).reshape(BATCH, 4)
    lengths = jnp.full(BATCH, 200, jnp.int32)
    slots = table[:, 3:] * 64 + 7
    tokens = jnp.zeros((BATCH, 1), jnp.int32)
    device = jax.local_devices()[0]

    def step(weights: dense_stack.Weights, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = mla.decode_step(config, table, lengths, slots)
        return dense_stack.forward(mla.decode, weights, config, tokens, pool, made)

    pool = cache.make_pool(weights.num_layers, PAGES)
    compiled = jax.jit(step, donate_argnums=1).lower(weights, pool).compile()
    size, pointer = pool.nbytes, pool.unsafe_buffer_pointer()
    jax.block_until_ready(pool)
    before = device.memory_stats()["peak_bytes_in_use"]
    _, pool = jax.block_until_ready(compiled(weights, pool))
    told = {
        "pool": size,
        "before": before,
        "peak": device.memory_stats()["peak_bytes_in_use"],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "same_pointer": pool.unsafe_buffer_pointer() == pointer,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
