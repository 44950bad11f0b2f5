"""Cosines and sines of the rotary embedding, by position, with YaRN."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.mla.config import MLAConfig, Yarn


def inverse_frequencies(config: MLAConfig) -> np.ndarray:
    """Angle per token of each column pair, float32 `[32]`.

    Plain: `theta ** (-2 i / 64)`. YaRN slows a pair down by `factor` the more, the fewer turns it
    makes within the original context: beyond `beta_fast` turns not at all, below `beta_slow` fully.
    """
    dim = config.qk_rope_head_dim
    plain = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.yarn is None:
        return plain.astype(np.float32)
    low, high = _ramp(config.yarn, config.rope_theta, dim)
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)  # share, [32]
    stretched = plain / config.yarn.factor
    return (stretched * slowed + plain * (1.0 - slowed)).astype(np.float32)


def cos_sin(config: MLAConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each column pair's angle, for `jax_flashmla.rope.rotate`.

    The angle is the float32 product of position and frequency, as it is where these models are
    trained: at position 131,071 a rounder one would be up to 0.004 off theirs.

    Args:
        config: of the layer.
        positions: int32 `[...]`; below 0 (rows that are padding) counts as 0.

    Returns:
        Two float32 `[..., 32]`, with YaRN times its factor.
    """
    wide = jnp.maximum(positions, 0).astype(jnp.float32)[..., None]
    frequencies = inverse_frequencies(config).reshape((1,) * positions.ndim + (-1,))
    angles = wide * jnp.asarray(frequencies)
    scale = np.float32(config.yarn.rotation_scale if config.yarn else 1.0)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _ramp(yarn: Yarn, theta: float, dim: int) -> tuple[float, float]:
    """First and last column pair of the ramp between kept and slowed frequencies."""

    def pair_with(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001  # a step in the place of a division by 0
