"""The absorbed query projection on the GPU: against float64, its bits, in loops and graphs."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from query_cases import CASES, K2, V2_LITE, Case

from jax_flashmla import _ffi, _queries, mla
from jax_flashmla.testing import query_oracle
from jax_flashmla.testing.cache_oracle import bits
from jax_flashmla.testing.query_oracle import Sizes

MOST_HEADS_CHECKED = 12  # the oracle is the host's
# Clusters of eight, four, three and two blocks and none; 8, 16, 32, 64 and 128 tokens of a block.
KERNELS = {
    "eight blocks": Sizes(7, 1, 512, 4, 128, down=True),
    "four blocks": Sizes(30, 1, 256, 18, 192),
    "three blocks": Sizes(9, 1, 192, 34, 128),
    "two blocks": Sizes(50, 1, 128, 50, 128),
    "one block": Sizes(20, 1, 64, 80, 192, down=True),
    "one block of many tokens": Sizes(100, 1, 64, 80, 128),
    "many blocks of tokens": Sizes(70, 1, 512, 3, 192),
}
Results = tuple[jax.Array, ...]
Project = Callable[..., Results]


@pytest.fixture
def project(implementation: str) -> Project:
    """Takes operands, as `_queries.absorbed_queries` does."""

    def run(*operands: jax.Array, interleave: bool = True) -> Results:
        return _queries.absorbed_queries(
            operands, interleave=interleave, implementation=implementation
        )

    return run


def operands(sizes: Sizes, dtype: str = "bfloat16", seed: int = 0) -> Results:
    arrays = query_oracle.random_arrays(sizes, dtype, seed)
    return tuple(map(jnp.asarray, query_oracle.operands(arrays)))


def some_heads(heads: int) -> list[int]:
    """The first and the last ones and some between."""
    return sorted({*np.linspace(0, heads - 1, min(heads, MOST_HEADS_CHECKED), dtype=int).tolist()})


def assert_same_bits(got: Sequence[jax.Array], expected: Sequence[jax.Array]) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


# Values.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_are_exact_but_for_rounding(case: Case, project: Project) -> None:
    """And all heads have the bits that they have in a second call."""
    arrays = query_oracle.random_arrays(case.sizes, case.dtype)
    run = jax.jit(functools.partial(project, interleave=case.interleave))
    given = [jnp.asarray(array) for array in query_oracle.operands(arrays)]
    got = run(*given)
    assert not any(jnp.isnan(x).any() for x in got)
    heads = some_heads(case.sizes.heads)
    faults = query_oracle.faults(got, arrays, interleave=case.interleave, heads=heads)
    assert faults == 0
    assert_same_bits(run(*given), got)


def test_the_public_function_gives_the_same(project: Project, implementation: str) -> None:
    given = operands(Sizes(3, 2, 128, 4, 128))
    got = mla.absorbed_queries(*given, rope_interleave=True, implementation=implementation)
    assert_same_bits(got, project(*given))


@pytest.mark.parametrize("hole", [np.nan, np.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_a_token_does_not_depend_on_the_others(name: str, hole: float, project: Project) -> None:
    sizes = KERNELS[name]
    x, query_up, key_up, cos, sin, *down = operands(sizes)
    run = jax.jit(project)
    plain = run(x, query_up, key_up, cos, sin, *down)
    for kept in sorted({0, sizes.batch // 2, sizes.batch - 1}):
        others = (jnp.arange(sizes.batch) != kept)[:, None, None]
        x_of_one, cos_of_one, sin_of_one = (
            jnp.where(others, jnp.asarray(hole, array.dtype), array) for array in (x, cos, sin)
        )
        got = run(x_of_one, query_up, key_up, cos_of_one, sin_of_one, *down)
        assert_same_bits([x[kept] for x in got], [x[kept] for x in plain])


@pytest.mark.parametrize("name", KERNELS)
def test_a_head_does_not_depend_on_the_others(name: str, project: Project) -> None:
    x, query_up, key_up, *rest = operands(KERNELS[name])
    heads = key_up.shape[0]
    run = jax.jit(project)
    plain = run(x, query_up, key_up, *rest)
    for kept in (0, heads - 1):
        others = (jnp.arange(heads) != kept)[:, None]
        got = run(
            x,
            jnp.where(others[None], jnp.nan, query_up),
            jnp.where(others[..., None], jnp.nan, key_up),
            *rest,
        )
        assert_same_bits([x[:, :, kept] for x in got[:2]], [x[:, :, kept] for x in plain[:2]])
        assert_same_bits(got[2:], plain[2:])


def test_no_bits_change_in_many_calls(project: Project, rehearsal: bool) -> None:
    run = jax.jit(project)
    for sizes in KERNELS.values():
        given = operands(sizes)
        first = run(*given)
        same = [
            jnp.array_equal(x, y)
            for _ in range(2 if rehearsal else 200)
            for x, y in zip(run(*given), first, strict=True)
        ]
        assert jnp.stack(same).all()


def test_results_of_more_than_two_to_the_31_elements(project: Project, rehearsal: bool) -> None:
    tokens, heads = (40, 3) if rehearsal else (40_000, 112)
    sizes = Sizes(1, 1, 64, heads, 128)
    _, *weights, _, _ = operands(sizes)
    row = jnp.arange(tokens, dtype=jnp.float32)[:, None, None]
    x = jnp.sin(row + jnp.arange(64, dtype=jnp.float32)[None, None]).astype(jnp.bfloat16)
    angles = row * jnp.linspace(0.1, 1, 32)[None, None]
    given = x, *weights, jnp.cos(angles), jnp.sin(angles)
    got = jax.jit(project)(*given)
    rows = np.asarray([0, tokens // 2, tokens - 1])
    arrays = dict(zip(query_oracle.OPERANDS, map(np.asarray, given), strict=False))
    arrays |= {name: arrays[name][rows] for name in ("x", "cos", "sin")}
    of_rows = [y[rows] for y in got]
    wanted = some_heads(heads)
    assert query_oracle.faults(of_rows, arrays, interleave=True, heads=wanted) == 0


# In programs.


@functools.partial(jax.jit, static_argnums=(0, 1))
def nans(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.full(shape, np.nan, dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_results_take_the_place_of_donated_arrays(name: str, project: Project) -> None:
    """What the kernel leaves unwritten would stay NaN."""
    given = operands(KERNELS[name])
    expected = project(*given)
    poison = tuple(nans(x.shape, x.dtype) for x in expected)
    places = {x.unsafe_buffer_pointer() for x in poison}

    def step(poison: Results, *given: jax.Array) -> Results:
        del poison
        return project(*given)

    got = jax.jit(step, donate_argnums=0, keep_unused=True)(poison, *given)
    assert {x.unsafe_buffer_pointer() for x in got} == places
    assert_same_bits(got, expected)


def test_hidden_states_that_are_donated_are_read_before_they_are_gone(project: Project) -> None:
    """The next layer's hidden states take the place of this one's."""
    x, *weights = operands(Sizes(16, 1, 512, 16, 128))
    expected = project(x, *weights)

    def step(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, Results]:
        results = project(x, *weights)
        return x + results[0].sum(axis=2), results

    place = x.unsafe_buffer_pointer()
    after, got = jax.jit(step, donate_argnums=0)(x, *weights)
    assert x.is_deleted()
    assert after.unsafe_buffer_pointer() == place
    assert_same_bits(got, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_eight_calls_in_one_program_are_right_at_every_replay(name: str, project: Project) -> None:
    """Each call has the tokens one place further: the same rows, one place further."""

    @jax.jit
    def chain(x: jax.Array, *rest: jax.Array) -> list[Results]:
        query_up, key_up, cos, sin, *down = rest
        turned = [[jnp.roll(y, i, axis=0) for y in (x, cos, sin)] for i in range(8)]
        return [project(x, query_up, key_up, cos, sin, *down) for x, cos, sin in turned]

    for seed in range(3):
        given = operands(KERNELS[name], seed=seed)
        plain = project(*given)
        for i, got in enumerate(chain(*given)):
            assert_same_bits(got, [jnp.roll(y, i, axis=0) for y in plain])


def test_scan_over_layers(project: Project) -> None:
    layers = [operands(Sizes(5, 1, 512, 8, 128, down=True), seed=seed) for seed in range(4)]
    x, _, _, cos, sin, _ = layers[0]
    stacked = [jnp.stack([layer[i] for layer in layers]) for i in (1, 2, 5)]

    @jax.jit
    def run(x: jax.Array, *stacked: jax.Array) -> Results:
        def layer(x: jax.Array, weights: Sequence[jax.Array]) -> tuple[jax.Array, Results]:
            query_up, key_up, down = weights
            results = project(x, query_up, key_up, cos, sin, down)
            return results[0][:, :, 0], results

        return jax.lax.scan(layer, x, stacked)[1]

    got = run(x, *stacked)
    for i, (_, query_up, key_up, _, _, down) in enumerate(layers):
        expected = project(x, query_up, key_up, cos, sin, down)
        assert_same_bits([y[i] for y in got], expected)
        x = expected[0][:, :, 0]


# Which path runs.


@pytest.mark.parametrize(("tokens", "model"), [(1, V2_LITE), (128, K2)])
def test_the_kernel_runs_by_default(
    tokens: int, model: tuple[int, int, int], rehearsal: bool
) -> None:
    if rehearsal:
        pytest.skip("the kernel is the GPU's")
    width, heads, nope = model
    shapes = [(tokens, 1, width), (width, heads, nope + 64), (heads, nope, 512)]
    described = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    described += [jax.ShapeDtypeStruct((tokens, 1, 32), jnp.float32)] * 2
    text = jax.jit(mla.absorbed_queries).lower(*described).as_text()
    assert _ffi.ABSORBED_QUERIES_TARGET in text
