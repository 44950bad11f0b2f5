"""What this device reaches through JAX in this run: pure read, copy, matmul."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from measure import Effort

from jax_flashmla._timing import time_steps


def measure(kv_cache: jax.Array, effort: Effort) -> dict[str, float]:
    """Measures the ceilings.

    Args:
        kv_cache: [num_pages, page_size, 1, head_dim_qk], read whole; half of it is copied.
        effort: How long, and how large a matmul.

    Returns:
        ``read_gbps`` (maximum of every page), ``copy_gbps`` (negate; bytes read plus written),
        ``matmul_tflops`` (bfloat16).
    """
    side = effort.matmul_side
    keys = jax.random.split(jax.random.key(3))
    # Scaled so that a chain of products keeps its magnitude.
    left = (jax.random.normal(keys[0], (side, side)) * side**-0.5).astype(kv_cache.dtype)
    right = jax.random.normal(keys[1], (side, side)).astype(kv_cache.dtype)
    half = jnp.array(kv_cache[: max(1, kv_cache.shape[0] // 2)])

    def seconds(step: Callable[[jax.Array], jax.Array], state: jax.Array) -> float:
        taken, _ = time_steps(step, state, repeats=effort.repeats, seconds=effort.seconds)
        return taken.median

    largest = jax.jit(lambda pool: pool.max(axis=(1, 2, 3)))
    negate = jax.jit(jnp.negative)
    read = seconds(lambda _: largest(kv_cache), right)
    copy = seconds(lambda _: negate(half), right)
    product = seconds(jax.jit(lambda x: left @ x), right)
    return {
        "read_gbps": kv_cache.nbytes / read / 1e9,
        "copy_gbps": 2 * half.nbytes / copy / 1e9,
        "matmul_tflops": 2 * side**3 / product / 1e12,
    }
