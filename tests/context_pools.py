"""One batch, its pages dealt out to devices that each have a pool of their own."""

import jax
import numpy as np

from jax_flashmla.testing import inputs

GARBAGE = 2147480000


def spread(data: inputs.Inputs, n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The pools and tables of n devices.

    Args:
        data: a batch over one pool.
        n: devices.
        seed: of the places that pages get.

    Returns:
        Pools `[n, num_pages, 64, h_kv, 576]`, NaN where no page lies, and tables int32
        `[n, b, ceil(width / n)]`, garbage behind each device's last page.
    """
    pool, table, lengths = (np.asarray(x) for x in data.arrays()[2:])
    batch, width = table.shape
    columns = -(-width // n)
    num_pages = max(1, batch * columns)
    pools = np.full((n, num_pages, *pool.shape[1:]), np.nan, pool.dtype)
    tables = np.full((n, batch, columns), GARBAGE, np.int32)
    rng = np.random.default_rng(seed)
    for device in range(n):
        free = list(rng.permutation(num_pages))
        for row in range(batch):
            for page in range(device, -(-int(lengths[row]) // 64), n):
                place = free.pop()
                pools[device, place] = pool[table[row, page]]
                tables[device, row, page // n] = place
    return pools, tables


def operands(data: inputs.Inputs, n: int) -> tuple[jax.Array | np.ndarray, ...]:
    """The arrays of `mla_decode_over_mesh`: pools end to end, a table for each device."""
    pools, tables = spread(data, n)
    flat = pools.reshape(-1, *pools.shape[2:])
    return data.q_latent, data.q_rope, flat, tables, np.asarray(data.cache_seqlens)
