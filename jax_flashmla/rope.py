"""Rotary position embedding of queries and keys, defined once for both."""

import jax
import jax.numpy as jnp

from jax_flashmla import _cache_shapes, _shapes


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleave: bool) -> jax.Array:
    """Rotates the rotary columns of queries or keys.

    Column pairs (i, i + 32) of the result are rotated by one angle each::

        first, second = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    The result has the half-split order in both cases, so queries and keys that went through this
    function agree, whatever the order a model's weights give. That is what transformers does for
    DeepSeek (`apply_rotary_pos_emb_interleave`). Computed in float32, rounded once.

    Args:
        x: `[..., 64]`, bfloat16, float16 or float32.
        cos: float32 `[..., 32]`, the cosine of each pair's angle, with YaRN times its attention
            factor. Its leading dimensions are those of x, or 1.
        sin: float32, the same for the sine.
        interleave: whether x holds a pair in neighbouring columns (2i, 2i + 1), else in columns
            (i, i + 32).

    Returns:
        An array of the shape and dtype of x.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong, or `interleave` is traced.
    """
    x, cos, sin = _shapes.as_arrays(x=x, cos=cos, sin=sin)
    _cache_shapes.check_rotation(x, cos, sin)
    wide = x.astype(jnp.float32)
    if _shapes.check_flag("interleave", interleave):
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
