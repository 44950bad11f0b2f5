"""What CUDA gets of the absorbed query projection, seen from a host without a GPU."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_flashmla import _dispatch, _ffi, _queries, mla
from jax_flashmla.testing import query_oracle
from jax_flashmla.testing.query_oracle import Sizes

Arrays = dict[str, Any]
Results = tuple[jax.Array, ...]


def described(
    tokens: tuple[int, int] = (4, 2),
    width: int = 128,
    nope: int = 128,
    dtype: str = "bfloat16",
    heads: int = 3,
) -> dict[str, jax.ShapeDtypeStruct]:
    rotation = jax.ShapeDtypeStruct((*tokens, 32), jnp.float32)
    return {
        "x": jax.ShapeDtypeStruct((*tokens, width), jnp.dtype(dtype)),
        "query_up": jax.ShapeDtypeStruct((width, heads, nope + 64), jnp.dtype(dtype)),
        "key_up": jax.ShapeDtypeStruct((heads, nope, 512), jnp.dtype(dtype)),
        "cos": rotation,
        "sin": rotation,
    }


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)


def lowered(function: Callable, *arrays: object, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def calls(text: str) -> list[str]:
    return re.findall(rf".*custom_call @{_ffi.ABSORBED_QUERIES_TARGET}\(.*", text)


def cuda_text(shapes: dict[str, jax.ShapeDtypeStruct], **options: object) -> str:
    return lowered(lambda arrays: mla.absorbed_queries(**arrays, **options), shapes)


@pytest.mark.parametrize("tokens", [(1, 1), (128, 1), (1, 128), (32, 4)], ids=str)
@pytest.mark.parametrize("interleave", [False, True])
def test_up_to_128_tokens_it_is_one_call_and_nothing_else(
    tokens: tuple[int, int], interleave: bool
) -> None:
    text = cuda_text(described(tokens), rope_interleave=interleave)
    assert set(re.findall(r"= stablehlo\.(\w+)", text)) == {"custom_call"}
    (line,) = calls(text)
    b, s_q = tokens
    assert f"mhlo.backend_config = {{interleave = {str(interleave).lower()}}}" in line
    assert f"-> (tensor<{b}x{s_q}x3x512xbf16>, tensor<{b}x{s_q}x3x64xbf16>)" in line


def test_down_is_a_sixth_operand_of_the_same_call() -> None:
    shapes = described() | {"down": jax.ShapeDtypeStruct((128, 576), jnp.bfloat16)}

    def with_down(arrays: Arrays) -> Results:
        given = query_oracle.operands(arrays)
        return _queries.absorbed_queries(given, interleave=False, implementation=None)

    (line,) = calls(lowered(with_down, shapes))
    assert "tensor<128x576xbf16>) -> " in line
    assert line.endswith("tensor<4x2x576xbf16>)")


REFUSED = {
    "float32": ({"dtype": "float32"}, "float32 has no kernel, bfloat16 and float16 have"),
    "width": ({"width": 96}, "x has 96 columns; the kernel takes 64 at a time"),
    "nope": ({"nope": 64}, "qk_nope_head_dim is 64; the kernel has 128 and 192"),
    "too many columns": (
        {"width": 2**20 + 64},
        "x has 1048640 columns, key_up 3 heads; the kernel takes 1048576 columns and 4096 heads",
    ),
    "too many heads": ({"heads": 2**12 + 1}, "x has 128 columns, key_up 4097 heads; the kernel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_a_kernel_cuda_gets_products(name: str) -> None:
    assert calls(cuda_text(described(**REFUSED[name][0]))) == []


@pytest.mark.parametrize("name", REFUSED)
def test_asking_for_a_kernel_that_there_is_not_is_an_error(name: str) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"implementation: got 'cuda', which cannot run: {reason}"):
        cuda_text(described(**changes), implementation="cuda")


@pytest.mark.parametrize("tokens", [(129, 1), (43, 3)], ids=str)
def test_more_than_128_tokens_go_to_the_kernel_only_when_asked(tokens: tuple[int, int]) -> None:
    assert calls(cuda_text(described(tokens))) == []
    assert len(calls(cuda_text(described(tokens), implementation="cuda"))) == 1


def test_asking_for_xla_never_calls_the_kernel() -> None:
    assert calls(cuda_text(described(), implementation="xla")) == []


def test_other_platforms_get_products() -> None:
    text = lowered(lambda arrays: mla.absorbed_queries(**arrays), described(), platform="cpu")
    assert calls(text) == []


def test_asking_for_the_kernel_on_a_cpu_is_an_error() -> None:
    arrays = query_oracle.random_arrays(Sizes(1, 1, 256, 2, 128), "bfloat16")
    with pytest.raises(RuntimeError, match="got 'cuda', which cannot run here: the kernel needs"):
        mla.absorbed_queries(**arrays, implementation="cuda")


@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_without_heads_nothing_is_called(implementation: str | None) -> None:
    assert calls(cuda_text(described(heads=0), implementation=implementation)) == []


def test_vmap_over_hidden_states_folds_into_the_batch() -> None:
    shapes = described((4, 2))
    stacked = {name: jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for name, x in shapes.items()}
    mapped = {name: 0 if name in ("x", "cos", "sin") else None for name in shapes}
    given = {name: (stacked if axis == 0 else shapes)[name] for name, axis in mapped.items()}
    call = jax.vmap(lambda arrays: mla.absorbed_queries(**arrays), ({**mapped},))
    (line,) = calls(lowered(call, given))
    assert "tensor<20x2x128xbf16>" in line
    assert "tensor<20x2x3x512xbf16>" in line


@pytest.mark.parametrize("mapped", ["query_up", "key_up", "x query_up", "down"])
def test_asking_for_the_kernel_with_mapped_weights_is_an_error(mapped: str) -> None:
    shapes = described() | {"down": jax.ShapeDtypeStruct((128, 576), jnp.bfloat16)}
    axes = tuple(0 if name in mapped.split() else None for name in query_oracle.OPERANDS)
    given = [
        shapes[name] if axis is None else jax.ShapeDtypeStruct((2, *shapes[name].shape), "bfloat16")
        for name, axis in zip(query_oracle.OPERANDS, axes, strict=True)
    ]

    def kernel(*arrays: jax.Array) -> Results:
        return _queries.absorbed_queries(arrays, interleave=False, implementation="cuda")

    with pytest.raises(ValueError, match="implementation: got 'cuda' and weights mapped by vmap"):
        lowered(jax.vmap(kernel, axes), *given)
