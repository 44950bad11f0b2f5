"""Rotation of queries and keys: its numbers, and the order that both forms end in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.rope import rotate
from jax_flashmla.testing import cache_oracle

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)


def data(*rows: int, dtype: jnp.dtype = jnp.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(rows))
    x = rng.standard_normal((*rows, 64)).astype(np.float32)
    return np.asarray(x.astype(jnp.dtype(dtype))), rng.uniform(-9, 9, (*rows, 32))


def as_rotation(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_rotation_is_a_complex_product_rounded_once(dtype: jnp.dtype, interleave: bool) -> None:
    x, angles = data(40, dtype=dtype)
    rotation = as_rotation(angles)
    got = rotate(x, *rotation, interleave=interleave)
    assert (got.shape, got.dtype) == (x.shape, jnp.dtype(dtype))
    assert cache_oracle.rotate(x, *rotation, interleave=interleave).faults(got) == 0
    assert cache_oracle.rotate(x, *rotation, interleave=not interleave).faults(got) > 1000


def test_interleaved_pairs_end_half_split() -> None:
    x = np.arange(64, dtype=np.float32)
    still = np.ones(32, np.float32), np.zeros(32, np.float32)
    np.testing.assert_array_equal(rotate(x, *still, interleave=False), x)
    expected = np.concatenate([x[0::2], x[1::2]])
    np.testing.assert_array_equal(rotate(x, *still, interleave=True), expected)


@pytest.mark.parametrize("interleave", [False, True])
def test_products_depend_on_the_difference_of_positions_only(interleave: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 64)).astype(np.float32)
    frequency = 10000.0 ** (-np.arange(32) / 32)

    def product(q_position: int, k_position: int) -> float:
        turned = [
            rotate(x, *as_rotation(position * frequency), interleave=interleave)
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(np.dot(*np.asarray(turned, np.float64)))

    assert product(107, 100) == pytest.approx(product(7, 0), abs=1e-3)
    assert abs(product(107, 100) - product(107, 99)) > 1e-2


def test_heads_share_the_angles_of_their_token() -> None:
    x, angles = data(3, 5)
    cos, sin = as_rotation(angles[:, :1])
    got = jax.jit(lambda *arrays: rotate(*arrays, interleave=True))(x, cos, sin)
    for head in range(5):
        one = rotate(x[:, head], cos[:, 0], sin[:, 0], interleave=True)
        np.testing.assert_allclose(got[:, head], one, rtol=1e-6, atol=1e-6)


ERRORS = {
    "x": (np.zeros((2, 63), np.float32), ValueError, r"got shape \[2, 63\], expected \[..., 64\]"),
    "cos": (np.zeros((2, 64), np.float32), ValueError, r"got shape \[2, 64\], expected \[2 or 1, "),
    "sin": (np.zeros(32, np.float32), ValueError, r"got shape \[32\], expected \[2 or 1, 32\]"),
    "interleave": (1, TypeError, "got 1, expected True or False"),
}


@pytest.mark.parametrize("argument", ERRORS)
def test_errors_name_argument_got_and_expected(argument: str) -> None:
    value, error, text = ERRORS[argument]
    half = np.zeros((2, 32), np.float32)
    arguments = {"x": np.zeros((2, 64), np.float32), "cos": half, "sin": half, "interleave": True}
    with pytest.raises(error, match=f"{argument}: {text}"):
        rotate(**arguments | {argument: value})


def test_angles_are_float32() -> None:
    half = np.zeros((2, 32), jnp.bfloat16)
    with pytest.raises(TypeError, match="cos: got bfloat16, expected float32"):
        rotate(np.zeros((2, 64), jnp.bfloat16), half, half, interleave=False)
