"""The absorbed query projection: against float64, under jit and vmap."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import _queries, mla
from jax_flashmla.testing import query_oracle
from jax_flashmla.testing.query_oracle import Sizes

Arrays = dict[str, Any]
Results = tuple[jax.Array, ...]

SIZES = {
    "batch and queries": Sizes(2, 3, 192, 3, 128),
    "192 columns of a head": Sizes(3, 1, 64, 2, 192),
    "one row": Sizes(1, 1, 256, 2, 128),
    "sizes without a kernel": Sizes(3, 2, 100, 5, 24),
    "with down": Sizes(2, 2, 128, 2, 128, down=True),
    "with down, one row": Sizes(1, 1, 128, 2, 128, down=True),
}


def project(arrays: Arrays, *, interleave: bool = False) -> Results:
    """The public function; given down, the one behind it."""
    if "down" in arrays:
        given = tuple(map(jnp.asarray, query_oracle.operands(arrays)))
        return _queries.absorbed_queries(given, interleave=interleave, implementation=None)
    return mla.absorbed_queries(**arrays, rope_interleave=interleave)


# Values.


@pytest.mark.parametrize("interleave", [False, True])
# Not bfloat16: on a CPU the newest XLA does not sum its products in float32.
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", SIZES)
def test_results_are_exact_but_for_rounding(name: str, dtype: str, interleave: bool) -> None:
    arrays = query_oracle.random_arrays(SIZES[name], dtype)
    got = project(arrays, interleave=interleave)
    assert {x.dtype for x in got} == {jnp.dtype(dtype)}
    assert query_oracle.faults(got, arrays, interleave=interleave) == 0


def test_of_some_heads_the_oracle_says_what_it_says_of_all() -> None:
    arrays = query_oracle.random_arrays(SIZES["with down"], "float16")
    latent, *rest = project(arrays)
    assert query_oracle.faults((latent, *rest), arrays, interleave=False, heads=[1]) == 0
    wrong = latent.at[:, :, 1].multiply(jnp.float16(1.1)), *rest
    assert query_oracle.faults(wrong, arrays, interleave=False, heads=[1]) > 1000
    assert query_oracle.faults(wrong, arrays, interleave=False, heads=[0]) == 0


def no_rotation(arrays: Arrays) -> Arrays:
    return arrays | {"cos": np.ones_like(arrays["cos"]), "sin": np.zeros_like(arrays["sin"])}


def turned_back(arrays: Arrays) -> Arrays:
    return arrays | {"sin": -arrays["sin"]}


def neighbours_exchanged(arrays: Arrays) -> Arrays:
    return arrays | {"x": arrays["x"][:, ::-1]}


def angles_exchanged(arrays: Arrays) -> Arrays:
    return arrays | {name: arrays[name][:, ::-1] for name in ("cos", "sin")}


def heads_exchanged(arrays: Arrays) -> Arrays:
    return arrays | {"key_up": arrays["key_up"][::-1]}


def one_column_of_a_head_left_out(arrays: Arrays) -> Arrays:
    kept = np.arange(arrays["key_up"].shape[1]) != 77
    return arrays | {"key_up": arrays["key_up"] * kept[:, None].astype(arrays["key_up"].dtype)}


def one_column_of_x_left_out(arrays: Arrays) -> Arrays:
    kept = np.arange(arrays["x"].shape[2]) != 1000
    return arrays | {"x": arrays["x"] * kept.astype(arrays["x"].dtype)}


WRONG = (
    no_rotation,
    turned_back,
    neighbours_exchanged,
    angles_exchanged,
    heads_exchanged,
    one_column_of_a_head_left_out,
    one_column_of_x_left_out,
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_oracle_sees_what_is_wrong(dtype: str, wrong: Callable[[Arrays], Arrays]) -> None:
    arrays = query_oracle.random_arrays(Sizes(1, 2, 1536, 2, 128), dtype)
    for interleave in (False, True):
        got = project(wrong(arrays), interleave=interleave)
        assert query_oracle.faults(got, arrays, interleave=interleave) > 100


def test_the_oracle_sees_the_other_order_of_pairs_and_a_nan() -> None:
    arrays = query_oracle.random_arrays(SIZES["batch and queries"], "float16")
    latent, rope = project(arrays, interleave=True)
    assert query_oracle.faults((latent, rope), arrays, interleave=False) > 100
    hole = latent.at[0, 0, 0, 7].set(jnp.nan)
    assert query_oracle.faults((hole, rope), arrays, interleave=True) == 1


# Transformations.


EMPTY = {
    "no requests": Sizes(0, 2, 128, 3, 128, down=True),
    "no queries": Sizes(2, 0, 128, 3, 128, down=True),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_tokens_give_empty_results(name: str) -> None:
    sizes = EMPTY[name]
    arrays = query_oracle.random_arrays(sizes, "bfloat16")
    got = jax.jit(functools.partial(project, interleave=True))(arrays)
    rows = sizes.batch, sizes.queries
    assert [x.shape for x in got] == [(*rows, 3, 512), (*rows, 3, 64), (*rows, 576)]
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}


def test_no_heads_give_empty_results() -> None:
    arrays = query_oracle.random_arrays(Sizes(2, 3, 128, 0, 128), "bfloat16")
    assert [x.shape for x in jax.jit(project)(arrays)] == [(2, 3, 0, 512), (2, 3, 0, 64)]


def test_without_heads_the_rows_beside_the_queries_are_projected() -> None:
    arrays = query_oracle.random_arrays(Sizes(2, 3, 128, 0, 128, down=True), "float32")
    *_, projected = jax.jit(project)(arrays)
    np.testing.assert_allclose(projected, arrays["x"] @ arrays["down"], rtol=1e-4, atol=1e-5)


def test_under_jit_it_is_one_primitive() -> None:
    arrays = query_oracle.random_arrays(SIZES["batch and queries"], "float32")
    text = str(jax.make_jaxpr(jax.jit(project))(arrays))
    assert len(re.findall(rf"= {_queries.absorbed_queries_p.name}\[", text)) == 1
    assert "dot_general" not in text
    assert query_oracle.faults(jax.jit(project)(arrays), arrays, interleave=False) == 0


@pytest.mark.parametrize(
    "mapped", ["x", "x cos sin", "cos", "query_up", "x key_up", "down", "x down cos"]
)
def test_vmap_gives_what_single_calls_give(mapped: str) -> None:
    """Hidden states fold into the batch; weights fall back to XLA's batched products."""
    sizes = Sizes(2, 2, 64, 2, 128, down="down" in mapped)
    one, other = (query_oracle.random_arrays(sizes, "float32", seed) for seed in (0, 1))
    other = {name: (other if name in mapped.split() else one)[name] for name in one}
    axes = {name: 0 if name in mapped.split() else None for name in one}
    stacked = {
        name: np.stack([one[name], other[name]]) if axes[name] == 0 else one[name] for name in one
    }
    got = jax.jit(jax.vmap(project, (axes,)))(stacked)
    for i, arrays in enumerate((one, other)):
        assert query_oracle.faults([x[i] for x in got], arrays, interleave=False) == 0


@pytest.mark.parametrize("argument", ["x", "query_up", "key_up", "cos"])
def test_a_derivative_is_refused_by_name(argument: str) -> None:
    arrays = query_oracle.random_arrays(SIZES["one row"], "float32")

    def loss(value: jax.Array) -> jax.Array:
        return sum(x.sum() for x in project(arrays | {argument: value}))

    with pytest.raises(NotImplementedError, match="inference-only: absorbed_queries has no deriv"):
        jax.grad(loss)(jnp.asarray(arrays[argument]))
