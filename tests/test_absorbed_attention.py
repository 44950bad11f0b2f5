"""The attention of a layer in one call: the steps' result, what CUDA gets of it, memory."""

import functools
import re

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SMALL, Problem, problem, ragged

from jax_flashmla import _absorbed_attention, _dispatch, _ffi, mla
from jax_flashmla.mla import layer

Results = tuple[jax.Array, jax.Array]
TARGET = _ffi.ABSORBED_ATTENTION_TARGET
TOLERANCES = {"float32": 1e-5, "bfloat16": 2.0**-6}
BATCHES = {
    "ragged": (ragged(4), 1),
    "two queries": (ragged(4), 2),
    "a single row": ([70], 1),
    "one request of two queries": ([70], 2),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)


def attend(name: str, given: Problem, *, in_steps: bool = False) -> Results:
    function = layer._attend_in_steps if in_steps else layer._attend
    return function(given.weights, SMALL[name], *given[1:], None)


def assert_near(got: Results, expected: Results, dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(
            np.float32(x), np.float32(y), rtol=tolerance, atol=tolerance, strict=True
        )


# Values.


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SMALL)
def test_it_gives_what_the_steps_give(name: str, batch: str, dtype: str) -> None:
    lengths, s_q = BATCHES[batch]
    given = problem(SMALL[name], lengths, s_q=s_q, dtype=dtype)
    got, expected = (
        jax.jit(functools.partial(attend, name, in_steps=steps))(given) for steps in (False, True)
    )
    assert_near(got, expected, dtype)
    assert jnp.any(got[1] != given.pool)


@pytest.mark.parametrize("name", SMALL)
def test_outside_of_jit(name: str) -> None:
    given = problem(SMALL[name], ragged(3))
    assert_near(attend(name, given), attend(name, given, in_steps=True), "float32")


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_behind_down_is_part_of_it_in_low_rank(bias: bool) -> None:
    given = problem(SMALL["low rank"], ragged(3), bias=bias)
    got = attend("low rank", given)
    assert_near(got, attend("low rank", given, in_steps=True), "float32")


EMPTY = {
    "no requests": lambda given: given._replace(
        x=given.x[:0],
        step=mla.decode_step(SMALL["low rank"], *(x[:0] for x in tables(given.step))),
    ),
    "no pages": lambda given: given._replace(pool=given.pool[:0]),
    "no table": lambda given: given._replace(
        step=given.step._replace(block_table=given.step.block_table[:, :0])
    ),
}


def tables(step: mla.Step) -> tuple[jax.Array, ...]:
    return step.block_table, step.cache_seqlens, step.slots


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_attend_to_gives_zeros(name: str) -> None:
    given = EMPTY[name](problem(SMALL["low rank"], [0, 0]))
    out, pool = jax.jit(functools.partial(attend, "low rank"))(given)
    assert out.shape == (*given.x.shape[:2], 4, 512)
    assert not out.any()
    np.testing.assert_array_equal(pool, given.pool)


# What CUDA gets.


def cuda_text(config: mla.MLAConfig, given: Problem, **options: object) -> str:
    def run(given: Problem) -> Results:
        return mla.decode(given.weights, config, *given[1:], **options)

    return jax.jit(run).trace(given).lower(lowering_platforms=("cuda",)).as_text()


def described(config: mla.MLAConfig, batch: int = 2, s_q: int = 1, **options: object) -> Problem:
    """Of weights no values are needed."""
    make = functools.partial(problem, config, [70] * batch, s_q=s_q, **options)
    dtype = {"dtype": "bfloat16"} | options
    return jax.eval_shape(lambda: make(**dtype))


def targets(text: str) -> list[str]:
    return re.findall(r"custom_call @jax_flashmla_(\w+)\(", text)


@pytest.mark.parametrize("tokens", [(1, 1), (2, 2), (128, 1), (64, 2)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_up_to_128_tokens_it_is_one_call_that_aliases_the_pool(
    name: str, tokens: tuple[int, int]
) -> None:
    given = described(SMALL[name], *tokens)
    text = cuda_text(SMALL[name], given)
    assert targets(text) == ["absorbed_attention"]
    (line,) = [line for line in text.splitlines() if f"@{TARGET}(" in line]
    place = _absorbed_attention.Operands._fields.index("kv_cache")
    alias = f"output_operand_alias<output_tuple_indices = [1], operand_index = {place},"
    assert alias in line
    assert f"low_rank = {str(name == 'low rank').lower()}" in line


def test_a_single_row_of_a_low_rank_comes_twice() -> None:
    given = described(SMALL["low rank"], 1)
    (line,) = [x for x in cuda_text(SMALL["low rank"], given).splitlines() if f"@{TARGET}(" in x]
    assert ": (tensor<2x1x704xbf16>, " in line
    assert "-> (tensor<1x1x4x512xbf16>, " in line


def test_nothing_else_has_a_pool_as_its_result() -> None:
    given = described(SMALL["low rank"])
    pool = f"tensor<{len(given.pool)}x64x1x576xbf16>"
    results = [
        line.split("->")[-1] if "->" in line else line.split(" : ")[-1]
        for line in cuda_text(SMALL["low rank"], given).splitlines()
        if "= stablehlo." in line
    ]
    assert sum(pool in types for types in results) == 1


STEPS = ["absorbed_queries", "append_projected", "decode"]
NO_KERNEL_FOR_QUERIES = mla.MLAConfig(192, 3, qk_nope_head_dim=64, v_head_dim=128)
ODD_RANK = mla.MLAConfig(192, 3, **attention_cases.DIMS, q_lora_rank=96)
WIDE_RANK = mla.MLAConfig(192, 1, **attention_cases.DIMS, q_lora_rank=4160)
SEPARATE: dict[str, tuple[mla.MLAConfig, dict[str, object], list[str]]] = {
    "129 tokens": (SMALL["low rank"], {"batch": 129}, STEPS[1:]),
    "129 tokens, no low rank": (SMALL["no low rank"], {"batch": 43, "s_q": 3}, STEPS[1:]),
    "64 columns of a head": (NO_KERNEL_FOR_QUERIES, {}, STEPS[1:]),
    "a rank that is no multiple of 64": (ODD_RANK, {}, STEPS[1:]),
    "a rank above 4096": (WIDE_RANK, {}, STEPS),
    "a bias without a low rank": (SMALL["no low rank"], {"bias": True}, STEPS),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_without_a_kernel_for_all_the_steps_are_separate_calls(name: str) -> None:
    config, options, expected = SEPARATE[name]
    assert targets(cuda_text(config, described(config, **options))) == expected


def test_without_heads_there_is_no_call_that_its_handler_refuses() -> None:
    given = described(SMALL["low rank"])
    heads = {"query_up": (128, 0, 192), "key_up": (0, 128, 512)}
    none = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in heads.items()}
    given = given._replace(weights=given.weights._replace(**none))
    run = jax.jit(functools.partial(attend, "low rank"))
    text = run.trace(given).lower(lowering_platforms=("cuda",)).as_text()
    assert targets(text) == ["append_projected"]


def test_without_a_kernel_asking_for_kernels_gets_those_there_are() -> None:
    given = described(NO_KERNEL_FOR_QUERIES)
    assert targets(cuda_text(NO_KERNEL_FOR_QUERIES, given, implementation="cuda")) == STEPS[1:]


@pytest.mark.parametrize("name", SMALL)
def test_asking_for_xla_calls_nothing(name: str) -> None:
    given = described(SMALL[name])
    assert targets(cuda_text(SMALL[name], given, implementation="xla")) == []


def test_float32_calls_nothing() -> None:
    given = described(SMALL["low rank"], dtype="float32")
    with pytest.warns(UserWarning, match="takes the slow portable path: float32 has no kernel"):
        assert targets(cuda_text(SMALL["low rank"], given)) == []


@pytest.mark.parametrize("name", SMALL)
def test_asking_for_a_kernel_in_float32_is_an_error(name: str) -> None:
    given = described(SMALL[name], dtype="float32")
    with pytest.raises(ValueError, match=r"got 'cuda', which .*float32 has no kernel"):
        cuda_text(SMALL[name], given, implementation="cuda")


def test_asking_for_the_kernel_on_a_cpu_is_an_error() -> None:
    given = problem(SMALL["low rank"], [70], dtype="bfloat16")
    with pytest.raises(RuntimeError, match="got 'cuda', which cannot run here: the kernel needs"):
        mla.decode(given.weights, SMALL["low rank"], *given[1:], implementation="cuda")


# Memory.


@pytest.mark.parametrize("name", SMALL)
def test_a_donated_pool_is_written_in_place(name: str) -> None:
    """In float32: XLA's CPU backend scatters 16-bit floats by way of a float32 copy."""
    config, given = SMALL[name], problem(SMALL[name], ragged(3))
    pool = jax.ShapeDtypeStruct((1024, *given.pool.shape[1:]), given.pool.dtype)

    def run(pool: jax.Array, rest: Problem) -> Results:
        return mla.decode(rest.weights, config, rest.x, pool, rest.step)

    compiled = jax.jit(run, donate_argnums=0).lower(pool, given._replace(pool=None)).compile()
    shapes = "1024,64,1,576", "65536,576"
    made = re.findall(rf"= \w+\[(?:{'|'.join(shapes)})\]\S* (\w+)\(", compiled.as_text())
    assert not {"copy", "convert", "broadcast", "transpose"} & set(made)
    memory, size = compiled.memory_analysis(), 1024 * 64 * 576 * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 16


def test_a_donated_pool_keeps_its_address() -> None:
    given = problem(SMALL["low rank"], ragged(3))
    address = given.pool.unsafe_buffer_pointer()

    def run(pool: jax.Array, rest: Problem) -> Results:
        return attend("low rank", rest._replace(pool=pool))

    _, pool = jax.jit(run, donate_argnums=0)(given.pool, given._replace(pool=None))
    assert given.pool.is_deleted()
    assert pool.unsafe_buffer_pointer() == address
