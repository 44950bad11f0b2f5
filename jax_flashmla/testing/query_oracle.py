"""The absorbed query projection in float64, how far off it a result may be, and random arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla.testing.cache_oracle import UNIT, Exact

Arrays = Mapping[str, np.ndarray]
OPERANDS = "x", "query_up", "key_up", "cos", "sin", "down"  # as `_queries.absorbed_queries` has it

# All relative to the root mean square of a row's truth.
SUMS = {"bfloat16": 2.0**-14, "float16": 2.0**-14, "float32": 2.0**-17}  # of sums in float32
ROUNDED_QUERIES = 3.0  # times UNIT: what rounding q_nope adds to q_latent; seen: up to 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays.

    Attributes:
        batch: requests, b.
        queries: query tokens per request, s_q.
        width: columns of x.
        heads: query heads, h_q.
        nope: qk_nope_head_dim.
        down: whether something is projected beside the queries.
    """

    batch: int
    queries: int
    width: int
    heads: int
    nope: int
    down: bool = False


def random_arrays(sizes: Sizes, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Makes x, query_up, key_up, cos, sin and, where asked for, down. Results are of size 1."""
    rng = np.random.default_rng(seed)
    rows = sizes.batch, sizes.queries

    def normal(contracted: int, *shape: int) -> np.ndarray:
        drawn = rng.standard_normal(shape, np.float32)
        drawn *= np.float32(contracted**-0.5)
        return drawn.astype(jnp.dtype(dtype))

    angles = rng.uniform(-9, 9, (*rows, 32))
    arrays = {
        "x": normal(1, *rows, sizes.width),
        "query_up": normal(sizes.width, sizes.width, sizes.heads, sizes.nope + 64),
        "key_up": normal(sizes.nope, sizes.heads, sizes.nope, 512),
        "cos": np.float32(np.cos(angles)),
        "sin": np.float32(np.sin(angles)),
    }
    return arrays | ({"down": normal(sizes.width, sizes.width, 576)} if sizes.down else {})


def operands(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arrays in their order, which a jitted function's dictionary does not keep."""
    return tuple(arrays[name] for name in OPERANDS if name in arrays)


def of_heads(arrays: Arrays, heads: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of a model that has only these heads."""
    query_up, key_up = arrays["query_up"][:, heads], arrays["key_up"][heads]
    return {**arrays, "query_up": query_up, "key_up": key_up}


def project(arrays: Arrays, *, interleave: bool) -> list[Exact]:
    """The exact q_latent, q_rope and, given down, x times it.

    The queries, x times query_up, are rounded to the dtype on their way, sums are in float32.
    """
    dtype = str(arrays["x"].dtype)
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    x, query_up = wide["x"], wide["query_up"]
    flat = x.reshape(-1, x.shape[-1]) @ query_up.reshape(len(query_up), -1)
    q_nope, q_rope = np.split(flat.reshape(*x.shape[:2], *query_up.shape[1:]), [-64], axis=-1)
    by_head = np.moveaxis(q_nope, 2, 0).reshape(q_nope.shape[2], -1, q_nope.shape[3])
    absorbed = np.moveaxis(by_head @ wide["key_up"], 0, 1)
    latent = absorbed.reshape(*q_nope.shape[:3], 512)
    cos, sin = wide["cos"][..., None, :], wide["sin"][..., None, :]
    rotated, terms = _rotated(q_rope, cos, sin, interleave=interleave)
    results = [
        _exact(latent, ROUNDED_QUERIES * _row_rms(latent), dtype),
        _exact(rotated, terms, dtype),
    ]
    if "down" in wide:
        results.append(_exact(x @ wide["down"], np.zeros(1), dtype))
    return results


def faults(
    got: Sequence[jax.Array | np.ndarray],
    arrays: Arrays,
    *,
    interleave: bool,
    heads: Sequence[int] | None = None,
) -> int:
    """How many elements of the results are wrong, in all heads or in some."""
    if heads is not None:
        arrays = of_heads(arrays, heads)
        got = [*(x[:, :, np.asarray(heads)] for x in got[:2]), *got[2:]]
    exact = project(arrays, interleave=interleave)
    return sum(
        expected.faults(_of_shape(x, expected)) for x, expected in zip(got, exact, strict=True)
    )


def _rotated(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleave: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates as complex numbers; and the magnitude of the terms, whose rounding adds up."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else np.split(x, 2, axis=-1)
    turned = (first + 1j * second) * (cos + 1j * sin)
    real = np.abs(first * cos) + np.abs(second * sin)
    imaginary = np.abs(second * cos) + np.abs(first * sin)
    values = np.concatenate([turned.real, turned.imag], axis=-1)
    return values, np.concatenate([real, imaginary], axis=-1)


def _exact(values: np.ndarray, rounded: np.ndarray, dtype: str) -> Exact:
    """Allows the last rounding, those before it of terms of that magnitude, and those of sums."""
    room = UNIT[dtype] * (np.abs(values) + rounded) + SUMS[dtype] * _row_rms(values)
    return Exact(values, room)


def _row_rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(values).mean(axis=-1, keepdims=True))


def _of_shape(got: jax.Array | np.ndarray, expected: Exact) -> np.ndarray:
    host = np.asarray(got)
    if host.shape != expected.values.shape:
        raise ValueError(f"got shape {host.shape}, expected {expected.values.shape}")
    return host
