"""The attention in one call under vmap and derivatives, and bad input by way of the layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SMALL, Problem, problem, ragged

from jax_flashmla import mla
from jax_flashmla.mla import layer

Results = tuple[jax.Array, jax.Array]


def attend(name: str, given: Problem, *, in_steps: bool = False) -> Results:
    function = layer._attend_in_steps if in_steps else layer._attend
    return function(given.weights, SMALL[name], *given[1:], None)


def decode(given: Problem) -> Results:
    return mla.decode(given.weights, SMALL["low rank"], *given[1:])


# Transformations.


def doubled(given: Problem, mapped: str) -> tuple[Problem, Problem]:
    """A problem with something of its own, and both stacked in front; the axes of a vmap."""
    parts = {"weights": given.weights, "step": given.step}
    of = {name: part for part, fields in parts.items() for name in fields._fields}
    axes: dict[str, Any] = {
        "weights": dict.fromkeys(mla.MLAWeights._fields),
        "step": dict.fromkeys(mla.Step._fields),
    }
    tops: dict[str, Any] = {}
    stacked = given
    for name in mapped.split():
        owner = getattr(stacked, of[name]) if name in of else stacked
        value = getattr(owner, name)
        owner = owner._replace(**{name: jnp.stack([value, jnp.flip(value, axis=-1)])})
        stacked = stacked._replace(**{of[name]: owner}) if name in of else owner
        (axes[of[name]] if name in of else tops)[name] = 0
    made = Problem(
        mla.MLAWeights(**axes["weights"]), tops.get("x"), tops.get("pool"), mla.Step(**axes["step"])
    )
    return stacked, made


ALLOWED = {  # what leaves one pool for all
    "low rank": ["query_up", "key_up", "query_up key_up", "query_norm", "block_table"],
    "no low rank": ["block_table", "cache_seqlens"],
}
REFUSED = {
    "low rank": ["x", "pool", "x pool", "slots", "down"],
    "no low rank": ["x", "pool", "x slots", "key_up", "down"],
}


def each(cases: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, mapped) for name, many in cases.items() for mapped in many]


def under_vmap(name: str, mapped: str, *, in_steps: bool) -> Results:
    given, axes = doubled(problem(SMALL[name], [70, 64, 1], s_q=1), mapped)
    over = jax.vmap(functools.partial(attend, name, in_steps=in_steps), (axes,))
    return jax.jit(over)(given)


@pytest.mark.parametrize(("name", "mapped"), each(ALLOWED))
def test_vmap_gives_what_the_steps_give(name: str, mapped: str) -> None:
    got, expected = (under_vmap(name, mapped, in_steps=steps) for steps in (False, True))
    assert len(got[0]) == 2
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize(("name", "mapped"), each(REFUSED))
def test_vmap_refuses_what_the_steps_refuse(name: str, mapped: str) -> None:
    for steps in (True, False):
        with pytest.raises(ValueError, match=r"cache: got (one|a) page pool .*mapped by vmap"):
            under_vmap(name, mapped, in_steps=steps)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("argument", ["x", "pool"])
def test_a_derivative_is_refused_by_name(name: str, argument: str) -> None:
    given = problem(SMALL[name], [70])

    def loss(value: jax.Array) -> jax.Array:
        return attend(name, given._replace(**{argument: value}))[0].sum()

    with pytest.raises(NotImplementedError, match="inference-only: MLA attention has no derivat"):
        jax.grad(loss)(getattr(given, argument))


@pytest.mark.parametrize("argument", ["query_up", "key_up", "latent_norm", "query_norm", "down"])
def test_a_derivative_by_a_weight_is_refused_by_name(argument: str) -> None:
    given = problem(SMALL["low rank"], [70])

    def loss(value: jax.Array) -> jax.Array:
        weights = given.weights._replace(**{argument: value})
        return decode(given._replace(weights=weights))[0].sum()

    with pytest.raises(NotImplementedError, match="inference-only: MLA attention has no derivat"):
        jax.jit(jax.grad(loss))(getattr(given.weights, argument))


# Bad input.


def of_step(**changes: Callable) -> Callable[[Problem], Problem]:
    def change(given: Problem) -> Problem:
        made = {name: new(getattr(given.step, name)) for name, new in changes.items()}
        return given._replace(step=given.step._replace(**made))

    return change


def of_weights(**changes: Callable) -> Callable[[Problem], Problem]:
    def change(given: Problem) -> Problem:
        made = {name: new(getattr(given.weights, name)) for name, new in changes.items()}
        return given._replace(weights=given.weights._replace(**made))

    return change


def of_pool(new: Callable) -> Callable[[Problem], Problem]:
    return lambda given: given._replace(pool=new(given.pool))


def of_schedule(**changes: Callable) -> Callable[[Problem], Problem]:
    def new(schedule: Any) -> Any:  # noqa: ANN401
        return schedule._replace(
            **{name: new(getattr(schedule, name)) for name, new in changes.items()}
        )

    return of_step(schedule=new)


WRONG: dict[str, tuple[Callable[[Problem], Problem], str, str]] = {
    "requests of slots": (of_step(slots=lambda x: x[:1]), "x", "expected [1, 1, 256]"),
    "queries of slots": (of_step(slots=lambda x: x.repeat(2, 1)), "x", "expected [3, 2, 256]"),
    "dtype of slots": (of_step(slots=jnp.float32), "slots", "got float32, expected int32"),
    "requests of block_table": (
        of_step(block_table=lambda x: x[:2]),
        "block_table",
        "got shape [2, 2], expected [3, max_pages_per_seq]",
    ),
    "rank of block_table": (of_step(block_table=lambda x: x[0]), "block_table", "got shape [2]"),
    "dtype of block_table": (of_step(block_table=jnp.float32), "block_table", "got float32"),
    "requests of cache_seqlens": (
        of_step(cache_seqlens=lambda x: x[:2]),
        "cache_seqlens",
        "got shape [2], expected [3]",
    ),
    "dtype of cache_seqlens": (of_step(cache_seqlens=jnp.int16), "cache_seqlens", "got int16"),
    "columns of the schedule": (
        of_schedule(tile_scheduler_metadata=lambda x: x[:, :7]),
        "tile_scheduler_metadata",
        ", 7], expected",
    ),
    "requests of the schedule": (
        of_schedule(num_splits=lambda x: x[:3]),
        "num_splits",
        "got shape [3], expected [4]",
    ),
    "dtype of the schedule": (of_schedule(num_splits=jnp.float32), "num_splits", "got float32"),
    "rank of the pool": (of_pool(lambda x: x[:, :, 0]), "cache", "64, 576], expected"),
    "page size": (of_pool(lambda x: x[:, :32]), "cache", "32, 1, 576], expected"),
    "columns of the pool": (of_pool(lambda x: x[..., :512]), "cache", "512], expected"),
    "heads of the pool": (of_pool(lambda x: x.repeat(2, 2)), "cache", "64, 2, 576], expected"),
    "columns of latent_norm": (
        of_weights(latent_norm=lambda x: x[:64]),
        "latent_norm",
        "got shape [64], expected [512]",
    ),
    "columns of query_norm": (of_weights(query_norm=lambda x: x[:64]), "query_norm", "expected"),
    "dtype of query_norm": (
        of_weights(query_norm=jnp.float16),
        "weights.query_norm",
        "got float16",
    ),
    "queries of cos": (of_step(cos=lambda x: x[:, :0]), "cos", "expected [3, 1, 32]"),
    "pairs of sin": (of_step(sin=lambda x: x[..., :8]), "sin", "expected [3, 1, 32]"),
    "dtype of cos": (of_step(cos=jnp.bfloat16), "cos", "got bfloat16, expected float32"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_while_tracing(name: str, dtype: str) -> None:
    """In bfloat16 by the one operation, in float32, which has no kernel, perhaps by a step."""
    change, argument, text = WRONG[name]
    given = change(problem(SMALL["low rank"], ragged(3), dtype=dtype))
    with pytest.raises((ValueError, TypeError)) as caught:
        jax.eval_shape(decode, given)
    message = str(caught.value)
    assert argument in message.split(":")[0]
    assert text in message
