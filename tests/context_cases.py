"""Batches for context parallelism, and what is to come of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jax_flashmla.testing import cases, inputs, oracle

FLOAT32_TOLERANCE = 2e-5
SCALE = 0.07
KINDS = [AxisType.Auto, AxisType.Explicit]
Decoded = tuple[jax.Array, jax.Array]


def mesh_of(axis_type: AxisType = AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    devices = jax.local_devices(backend="cpu")[: int(np.prod(list(axes.values())))]
    kinds = (axis_type,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def lengths_around(s_q: int, width: int) -> np.ndarray:
    """Every way in which a length can lie to the pages and to the steps of the mask."""
    edges = [0, 1, s_q - 1, s_q, 63, 64, 65, 64 + s_q - 1, 64 + s_q, 127, 128, 192, 191 + s_q]
    return np.minimum([*edges, 64 * width - 1, 64 * width], 64 * width).astype(np.int32)


@functools.cache
def batch(s_q: int, dtype: str = "float32", h_q: int = 4, h_kv: int = 1) -> inputs.Inputs:
    lengths = lengths_around(s_q, width=5)
    shape = cases.Shape(
        len(lengths), s_q, h_q, h_kv, pages=5, pool_pages=80, dtype=dtype, softmax_scale=SCALE
    )
    full = inputs.make_inputs(cases.Case(shape, "full"))
    return inputs.Inputs(*full.arrays()[:4], jnp.asarray(lengths))


@functools.cache
def truth(s_q: int, dtype: str = "float32", *, causal: bool = True) -> oracle.truth.Truth:
    return exact(batch(s_q, dtype), causal=causal)


def exact(data: inputs.Inputs, *, causal: bool = True) -> oracle.truth.Truth:
    q_latent, q_rope, *rest = (np.asarray(x) for x in data.arrays())
    q = np.concatenate([q_latent, q_rope], axis=-1)
    return oracle.attend(q, *rest, softmax_scale=SCALE, causal=causal)


def assert_near(got: Decoded, expected: oracle.truth.Truth) -> None:
    for x, y in zip(got, (expected.out, expected.lse), strict=True):
        wanted = y[: len(x)]  # some tests take the first requests of a batch
        np.testing.assert_allclose(x, wanted, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


def collectives(text: str) -> list[str]:
    """Those of a compiled program, sorted."""
    kinds = re.findall(r" (all-[a-z-]+?|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)
    return sorted(kinds)
