"""Bad arguments of the absorbed query projection: errors that name them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from argument_errors import assert_names_argument

from jax_flashmla import _queries, mla
from jax_flashmla.testing import query_oracle
from jax_flashmla.testing.query_oracle import Sizes

Arrays = dict[str, Any]


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, jnp.dtype(dtype))


def arrays() -> Arrays:
    return query_oracle.random_arrays(Sizes(2, 3, 128, 4, 128, down=True), "float32")


SHAPES = {
    "x of rank 2": ("x", zeros(6, 128), "got shape [6, 128], expected [b, s_q, width]"),
    "x of rank 4": ("x", zeros(2, 3, 1, 128), "got shape [2, 3, 1, 128]"),
    "width of query_up": ("query_up", zeros(64, 4, 192), "expected [128, 4, 192]"),
    "heads of query_up": ("query_up", zeros(128, 8, 192), "expected [128, 4, 192]"),
    "columns of query_up": ("query_up", zeros(128, 4, 128), "expected [128, 4, 192]"),
    "joined query_up": ("query_up", zeros(128, 768), "expected [128, 4, 192]"),
    "latent columns": ("key_up", zeros(4, 128, 576), "expected [h_q, qk_nope_head_dim, 512]"),
    "key_up by column": ("key_up", zeros(512, 512), "expected [h_q, qk_nope_head_dim, 512]"),
    "pairs of cos": ("cos", zeros(2, 3, 64), "got shape [2, 3, 64], expected [2, 3, 32]"),
    "queries of cos": ("cos", zeros(2, 1, 32), "expected [2, 3, 32]"),
    "cos by head": ("cos", zeros(2, 3, 1, 32), "expected [2, 3, 32]"),
    "batch of sin": ("sin", zeros(1, 3, 32), "expected [2, 3, 32]"),
}
DTYPES = {
    "integer x": ("x", zeros(2, 3, 128, dtype="int32"), "got int32, expected"),
    "half query_up": ("query_up", zeros(128, 4, 192, dtype="bfloat16"), "expected float32"),
    "half key_up": ("key_up", zeros(4, 128, 512, dtype="float16"), "expected float32"),
    "half cos": ("cos", zeros(2, 3, 32, dtype="bfloat16"), "got bfloat16, expected float32"),
    "half sin": ("sin", zeros(2, 3, 32, dtype="float16"), "got float16, expected float32"),
    "a list": ("x", [[[0.0]]], "got list, expected a JAX or NumPy array"),
    "flag as a number": ("rope_interleave", 1, "got"),
}


def public(wrong: Arrays) -> Arrays:
    given = arrays()
    del given["down"]
    return given | wrong


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_shape_is_named(name: str) -> None:
    argument, value, text = SHAPES[name]
    wrong = public({argument: value})
    assert_names_argument(mla.absorbed_queries, wrong, argument, ValueError, text)


@pytest.mark.parametrize("name", DTYPES)
def test_a_wrong_type_is_named(name: str) -> None:
    argument, value, text = DTYPES[name]
    wrong = public({argument: value})
    assert_names_argument(mla.absorbed_queries, wrong, argument, TypeError, text)


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(ValueError, match="implementation: got 'gpu', expected None"):
        mla.absorbed_queries(**public({}), implementation="gpu")


@pytest.mark.parametrize(
    ("down", "error", "text"),
    [
        (zeros(128, 512), ValueError, r"down: got shape \[128, 512\], expected \[128, 576\]"),
        (zeros(64, 576), ValueError, r"down: got shape \[64, 576\], expected \[128, 576\]"),
        (zeros(128, 576, dtype="bfloat16"), TypeError, "down: got bfloat16, expected float32"),
    ],
)
def test_a_wrong_down_is_named(down: np.ndarray, error: type[Exception], text: str) -> None:
    given = tuple(map(jnp.asarray, query_oracle.operands(arrays() | {"down": down})))
    with pytest.raises(error, match=text):
        _queries.absorbed_queries(given, interleave=False, implementation=None)
