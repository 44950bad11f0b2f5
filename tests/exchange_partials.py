"""Random partial results of several devices, and what is wrong with their merge."""

import jax.numpy as jnp
import numpy as np

from jax_flashmla.testing import cache_oracle


def draw(n: int, k: int, rows: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Outs `[n, k, rows, 512]` and lses `[n, k, rows]` of n devices.

    A share is empty, with NaN in its out; of several rows the last one wholly so.
    """
    rng = np.random.default_rng([n, k, rows])
    outs = rng.standard_normal((n, k, rows, 512)).astype(np.float32)
    lses = (3 * rng.standard_normal((n, k, rows))).astype(np.float32)
    hollow = rng.uniform(size=lses.shape) < 0.3
    hollow[..., -1] |= rows > 1
    outs[hollow], lses[hollow] = np.nan, -np.inf
    return np.asarray(outs.astype(jnp.dtype(dtype))), lses


def wrong(outs: np.ndarray, lses: np.ndarray, got: tuple) -> int:
    """Elements of a merge, out `[rows, 512]` and lse `[rows]`, that are too far off float64."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (outs, lses))
    expected = cache_oracle.merge(*flat, outs.dtype.name)
    return sum(e.faults(np.asarray(x)) for e, x in zip(expected, got, strict=True))
