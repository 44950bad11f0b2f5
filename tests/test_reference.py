"""The definition and the streamed lowering against the float64 NumPy loop of testing.oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_flashmla
from jax_flashmla import reference
from jax_flashmla.testing import batches, cases, compare, inputs, oracle

PAGE = cases.PAGE_SIZE
FLOAT32_TOLERANCE = 2e-5


@functools.partial(jax.jit, static_argnames=("softmax_scale", "causal"))
def decode(*arrays: jax.Array, softmax_scale: float, causal: bool) -> tuple[jax.Array, jax.Array]:
    return jax_flashmla.mla_decode(
        *arrays, softmax_scale=softmax_scale, causal=causal, num_sm_parts=3
    )


def static(shape: cases.Shape) -> dict[str, float | bool]:
    return {"softmax_scale": shape.softmax_scale, "causal": shape.causal}


def exact(case_inputs: inputs.Inputs, **options: float | bool) -> oracle.truth.Truth:
    q_latent, q_rope, *rest = (np.asarray(x) for x in case_inputs.arrays())
    return oracle.attend(np.concatenate([q_latent, q_rope], axis=-1), *rest, **options)


def assert_near(got: tuple[jax.Array, jax.Array], truth: oracle.truth.Truth) -> None:
    """Compares a float32 result, whose error no rounding of P or O explains."""
    out, lse = (np.asarray(x, np.float64) for x in got)
    np.testing.assert_allclose(out, truth.out, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)
    np.testing.assert_allclose(lse, truth.lse, atol=FLOAT32_TOLERANCE, rtol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("case", cases.small_cases(), ids=lambda case: case.name)
def test_streamed_is_as_good_as_an_ideal_kernel(case: cases.Case) -> None:
    data = inputs.make_inputs(case)
    out, lse = decode(*data.arrays(), **static(case.shape))
    verdict = compare.compare(out, lse, exact(data, **static(case.shape)))
    assert not verdict.faults, verdict.faults


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h_q", "h_kv"), [(4, 1), (6, 3)])
def test_definition_and_streamed_agree_with_the_loop(h_q: int, h_kv: int, causal: bool) -> None:
    shape = cases.Shape(3, 2, h_q, h_kv, pages=10, pool_pages=32, dtype="float32", causal=causal)
    data = inputs.make_inputs(cases.Case(shape, "edges", "sigma5"))
    truth = exact(data, **static(shape))
    assert_near(decode(*data.arrays(), **static(shape)), truth)
    finite = jnp.nan_to_num(data.kv_cache)
    q = jnp.concatenate([data.q_latent, data.q_rope], axis=-1)
    table, lengths = data.block_table, data.cache_seqlens
    assert_near(reference.definition(q, finite, table, lengths, **static(shape)), truth)


def small(lengths: list[int], **changes: int | bool | str) -> tuple[cases.Shape, inputs.Inputs]:
    """Inputs of chosen lengths, poisoned outside them like those of the named cases."""
    shape = cases.Shape(
        **{"batch": len(lengths), "s_q": 2, "h_q": 4, "pages": 3, "pool_pages": 8} | changes
    )
    case, rng = cases.Case(shape), np.random.default_rng(0)
    pages = batches.TABLE_PATTERNS["shuffled"](shape, rng)
    batch = batches.lay_out(np.asarray(lengths, np.int32), pages, shape, rng)
    data = inputs.make_inputs(case)
    pool = inputs.make_pool(shape, case.logits, batch, 0)
    arrays = jnp.asarray(batch.block_table), jnp.asarray(batch.cache_seqlens)
    return shape, inputs.Inputs(data.q_latent, data.q_rope, pool, *arrays)


def test_rows_without_a_key_give_zero_and_minus_infinity() -> None:
    shape, data = small([0, 1])
    out, lse = decode(*data.arrays(), **static(shape))
    assert np.all(np.asarray(out[0], np.float32) == 0)
    assert np.all(np.asarray(out[1, 0], np.float32) == 0)  # the first of two queries, one token
    np.testing.assert_array_equal(
        np.asarray(lse) == -np.inf, [[[True] * 4] * 2, [[True] * 4, [False] * 4]]
    )


def test_flashmla_convention_of_empty_rows_and_layout() -> None:
    shape, data = small([0, 65])
    _, lse = decode(*data.arrays(), softmax_scale=shape.softmax_scale, causal=False)
    q = jnp.concatenate([data.q_latent, data.q_rope], axis=-1)
    rest = data.kv_cache, data.block_table, data.cache_seqlens
    out, flash_lse = jax_flashmla.flash_mla_with_kvcache(q, *rest, 512, None, None)
    assert out.shape == (2, 2, 4, 512)
    assert np.all(np.asarray(flash_lse[0]) == np.inf)
    np.testing.assert_array_equal(np.asarray(flash_lse[1]), np.asarray(lse[1]).T)


def test_lengths_below_zero_count_as_zero_and_beyond_the_table_as_its_width() -> None:
    shape, data = small([0, 3 * PAGE])
    expected = decode(*data.arrays(), **static(shape))
    for below, beyond in [(-1, 3 * PAGE + 1), (-(2**31), 2**31 - 1)]:
        lengths = jnp.asarray([below, beyond], jnp.int32)
        got = decode(*data.arrays()[:4], lengths, softmax_scale=shape.softmax_scale, causal=False)
        np.testing.assert_array_equal(np.asarray(got[1][0]), np.asarray(expected[1][0]))
        full = decode(*data.arrays(), softmax_scale=shape.softmax_scale, causal=False)
        np.testing.assert_array_equal(np.asarray(got[1][1]), np.asarray(full[1][1]))


@pytest.mark.parametrize("entry", [-1, 8, 2147480000, -(2**31)])
def test_a_table_entry_out_of_range_reads_zeros(entry: int) -> None:
    shape, data = small([100, 150])
    q_latent, q_rope, pool, table, lengths = data.arrays()
    zeroed = pool.at[table[0, 1]].set(0)
    expected = decode(q_latent, q_rope, zeroed, table, lengths, **static(shape))
    wrong = table.at[0, 1].set(entry)
    out, lse = decode(q_latent, q_rope, pool, wrong, lengths, **static(shape))
    np.testing.assert_array_equal(np.asarray(lse), np.asarray(expected[1]))
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected[0], np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_its_own_request_only(value: float) -> None:
    shape, data = small([100, 150])
    expected = decode(*data.arrays(), **static(shape))
    pool = data.kv_cache.at[data.block_table[0, 1], 3].set(value)
    arrays = data.q_latent, data.q_rope, pool, data.block_table, data.cache_seqlens
    out, lse = decode(*arrays, **static(shape))
    assert np.all(np.isnan(np.asarray(out[0], np.float32)))
    np.testing.assert_array_equal(np.asarray(lse[1]), np.asarray(expected[1][1]))
    np.testing.assert_array_equal(
        np.asarray(out[1], np.float32), np.asarray(expected[0][1], np.float32)
    )


def test_the_joined_queries_give_the_same_bits() -> None:
    shape, data = small([65, 190], dtype="float16")
    expected = decode(*data.arrays(), **static(shape))
    q = jnp.concatenate([data.q_latent, data.q_rope], axis=-1)
    rest = data.kv_cache, data.block_table, data.cache_seqlens
    scale, causal = shape.softmax_scale, shape.causal
    out, _ = jax_flashmla.flash_mla_with_kvcache(q, *rest, 512, None, None, scale, causal)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected[0]))


def test_a_schedule_for_other_lengths_changes_nothing_here() -> None:
    shape, data = small([65, 190])
    other = jax_flashmla.get_mla_metadata(jnp.asarray([7000, 0], jnp.int32), 8, 1)
    scale = shape.softmax_scale
    got = jax_flashmla.mla_decode(*data.arrays(), softmax_scale=scale, schedule=other)
    expected = jax_flashmla.mla_decode(*data.arrays(), softmax_scale=scale)
    np.testing.assert_array_equal(np.asarray(got[1]), np.asarray(expected[1]))


def test_a_context_of_128k_tokens_runs_in_the_memory_of_a_chunk() -> None:
    tokens = 128 * 1024
    key = jax.random.key(0)
    pool = jax.random.normal(key, (16, PAGE, 1, 576), jnp.bfloat16)
    table = jnp.arange(tokens // PAGE, dtype=jnp.int32).reshape(1, -1) % 16
    q = jax.random.normal(key, (1, 1, 2, 576), jnp.bfloat16)
    arrays = q[..., :512], q[..., 512:], pool, table, jnp.asarray([tokens], jnp.int32)
    compiled = decode.lower(*arrays, softmax_scale=0.01, causal=True).compile()
    out, lse = compiled(*arrays)
    # The same 16 pages again and again: as many tokens in one stretch, and log(tokens) more.
    short = arrays[3][:, :16], jnp.asarray([16 * PAGE], jnp.int32)
    once, once_lse = decode(*arrays[:3], *short, softmax_scale=0.01, causal=True)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(once_lse) + np.log(128), rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(once, np.float32), atol=1e-3, rtol=1e-2
    )
    chunk = reference.CHUNK_PAGES * PAGE * 576 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * chunk


LENGTH = st.one_of(st.sampled_from([-1, 0, 1, 63, 64, 65, 192, 300]), st.integers(0, 192))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), s_q=st.sampled_from([1, 3]), causal=st.booleans())
def test_any_lengths_and_tables(data: st.DataObject, s_q: int, causal: bool) -> None:
    lengths = data.draw(st.lists(LENGTH, min_size=3, max_size=3))
    table = data.draw(st.lists(st.integers(0, 7), min_size=9, max_size=9))
    shape = cases.Shape(3, s_q, 4, h_kv=2, pages=3, pool_pages=8, dtype="float32", causal=causal)
    made = inputs.make_inputs(cases.Case(shape, "full", table="in_order"))
    arrays = inputs.Inputs(
        made.q_latent,
        made.q_rope,
        jnp.nan_to_num(made.kv_cache),
        jnp.asarray(table, jnp.int32).reshape(3, 3),
        jnp.asarray(lengths, jnp.int32),
    )
    got = decode(*arrays.arrays(), **static(shape))
    capped = np.minimum(lengths, 3 * PAGE).astype(np.int32)
    truth = exact(inputs.Inputs(*arrays.arrays()[:4], jnp.asarray(capped)), **static(shape))
    assert_near(got, truth)
