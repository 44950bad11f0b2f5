"""What the cache operations and the merge compile to: nothing of the pool's size is copied."""

import functools
import re
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import _dispatch, _ffi, cache

LAYERS, PAGES, ROWS = 3, 64, 5
Arrays = tuple[jax.Array, ...]

# Not bfloat16: XLA's CPU backend of JAX 0.10 widens whole bfloat16 arrays where it scatters.
DTYPES = ("float32", "float16")


def described(dtype: str = "bfloat16") -> dict[str, jax.ShapeDtypeStruct]:
    of = jax.ShapeDtypeStruct
    return {
        "cache": of((LAYERS * PAGES, 64, 1, 576), jnp.dtype(dtype)),
        "latent": of((ROWS, 512), jnp.dtype(dtype)),
        "rope": of((ROWS, 64), jnp.dtype(dtype)),
        "slots": of((ROWS,), jnp.int32),
        "cos": of((ROWS, 32), jnp.float32),
        "sin": of((ROWS, 32), jnp.float32),
    }


TABLE = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32)
LENGTHS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def append_once(pool: jax.Array, *rows: jax.Array) -> jax.Array:
    return cache.append(pool, *rows[:3], cos=rows[3], sin=rows[4])


def append_in_a_loop(pool: jax.Array, *rows: jax.Array) -> jax.Array:
    def body(i: jax.Array, pool: jax.Array) -> jax.Array:
        return append_once(pool, rows[0] * i.astype(pool.dtype), *rows[1:])

    return jax.lax.fori_loop(0, LAYERS, body, pool)


def scan_over_layers(pool: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The way a model uses it: each layer appends to its part of the pool and attends to it."""
    latent, rope, slots, cos, sin, table, lengths = rows

    def layer(carry: Arrays, index: jax.Array) -> tuple[Arrays, None]:
        x, pool = carry
        at = cache.layer_slots(slots, index, PAGES)
        pool = cache.append(pool, latent + x[:, 0, 0], rope, at, cos=cos, sin=sin)
        pages = cache.layer_block_table(table, index, PAGES)
        q_rope = jnp.repeat(rope[:, None, None], 2, axis=2)
        x, _ = jax_flashmla.mla_decode(x, q_rope, pool, pages, lengths, softmax_scale=0.1)
        return (x, pool), None

    x = jnp.repeat(latent[:, None, None], 2, axis=2)
    return jax.lax.scan(layer, (x, pool), jnp.arange(LAYERS, dtype=jnp.int32))[0]


PROGRAMS: dict[str, tuple[Callable, Arrays]] = {
    "append": (append_once, ()),
    "loop": (append_in_a_loop, ()),
    "scan_with_decode": (scan_over_layers, (TABLE, LENGTHS)),
}


def copies_of_the_pool(text: str, shape: tuple[int, ...]) -> list[str]:
    """Instructions of an optimised program that write something of the pool's size anew."""
    size = ",".join(map(str, shape))
    flat = f"{shape[0] * shape[1]},{shape[3]}"
    made = re.findall(rf"= \w+\[(?:{size}|{flat})\]\S* (\w+)\(", text)
    return [name for name in made if name in ("copy", "convert", "broadcast", "transpose")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_donated_pool_is_written_in_place(name: str, dtype: str) -> None:
    function, more = PROGRAMS[name]
    arrays = described(dtype)
    pool = arrays["cache"]
    compiled = jax.jit(function, donate_argnums=0).lower(*arrays.values(), *more).compile()
    assert copies_of_the_pool(compiled.as_text(), pool.shape) == []
    memory = compiled.memory_analysis()
    size = np.prod(pool.shape) * pool.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_a_pool_that_is_not_donated_is_copied_once() -> None:
    """The check above can fail: here the copy is what was asked for."""
    arrays = described("float32")
    text = jax.jit(append_once).lower(*arrays.values()).compile().as_text()
    assert copies_of_the_pool(text, arrays["cache"].shape) == ["copy"]


def test_a_donated_pool_keeps_its_address() -> None:
    pool = cache.make_pool(1, 4, dtype="float32")
    address = pool.unsafe_buffer_pointer()
    step = jax.jit(cache.append, donate_argnums=0)
    written = step(pool, jnp.ones((2, 512)), jnp.ones((2, 64)), jnp.array([0, 255], jnp.int32))
    assert pool.is_deleted()
    assert written.unsafe_buffer_pointer() == address


# What CUDA gets, seen from a host without a GPU.


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)


def lowered(function: Callable, *arrays: jax.ShapeDtypeStruct, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def operations(text: str) -> list[tuple[str, str]]:
    return re.findall(r"= stablehlo\.(\w+) ?(@\w+)?", text)


def append_line(interleave: bool, *, rotated: bool) -> str:
    arrays = list(described().values())
    if rotated:
        options = {"rope_interleave": interleave}
        text = lowered(lambda *x: cache.append(*x[:4], cos=x[4], sin=x[5], **options), *arrays)
    else:
        text = lowered(cache.append, *arrays[:4])
    assert operations(text) == [("custom_call", f"@{_ffi.APPEND_TARGET}")]
    return next(line for line in text.splitlines() if "custom_call" in line)


@pytest.mark.parametrize("interleave", [False, True])
def test_append_is_one_call_that_aliases_the_pool(interleave: bool) -> None:
    plain, rotated = append_line(False, rotated=False), append_line(interleave, rotated=True)
    assert "(%arg0, %arg1, %arg2, %arg3) " in plain
    assert "(%arg0, %arg1, %arg2, %arg3, %arg4, %arg5) " in rotated
    assert f"mhlo.backend_config = {{interleave = {str(interleave).lower()}}}" in rotated
    for line in (plain, rotated):
        assert "output_operand_alias<output_tuple_indices = [], operand_index = 0," in line


def test_gather_is_one_call() -> None:
    text = lowered(cache.gather, described()["cache"], TABLE, LENGTHS)
    assert operations(text) == [("custom_call", f"@{_ffi.GATHER_TARGET}")]
    assert f"-> tensor<{ROWS}x256x1x576xbf16>" in text


@pytest.mark.parametrize("given", ["bfloat16", "float16", "float32"])
def test_merge_is_one_call_on_rows(given: str) -> None:
    outs = jax.ShapeDtypeStruct((4, 2, 3, 16), jnp.dtype(given))
    lses = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32)
    merge = functools.partial(jax_flashmla.merge_partials, dtype="float16")
    text = lowered(merge, outs, lses)
    assert {name for name, _ in operations(text)} == {"custom_call", "reshape"}
    assert re.search(rf"@{_ffi.MERGE_TARGET}\(.*-> \(tensor<6x16xf16>, tensor<6xf32>\)", text)


def test_vmap_over_pools_is_one_call_on_the_flat_pool() -> None:
    arrays = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in described().values()]
    text = lowered(jax.vmap(lambda *x: cache.append(*x[:4])), *arrays)
    assert f"tensor<{2 * LAYERS * PAGES}x64x1x576xbf16>" in text
    assert text.count(f"@{_ffi.APPEND_TARGET}") == 1


REFUSED = {
    "append": (cache.append, list(described("float32").values())[:4]),
    "gather": (cache.gather, [described("float32")["cache"], TABLE, LENGTHS]),
    "merge_partials": (
        jax_flashmla.merge_partials,
        [
            jax.ShapeDtypeStruct((2, 3, 12), jnp.bfloat16),
            jax.ShapeDtypeStruct((2, 3), jnp.float32),
        ],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_without_a_kernel_cuda_gets_the_portable_path_and_a_warning(name: str) -> None:
    function, arrays = REFUSED[name]
    with pytest.warns(UserWarning, match=f"{name} takes the slow portable path"):
        assert "custom_call" not in lowered(function, *arrays)
    asked = functools.partial(function, implementation="cuda")
    with pytest.raises(ValueError, match="implementation: got 'cuda', which cannot run"):
        lowered(asked, *arrays)


def test_other_platforms_and_xla_get_the_portable_path() -> None:
    arrays = list(described().values())[:4]
    assert "custom_call" not in lowered(cache.append, *arrays, platform="cpu")
    chosen = functools.partial(cache.append, implementation="xla")
    assert "custom_call" not in lowered(chosen, *arrays)


def test_export_round_trip_for_two_platforms() -> None:
    def step(pool: jax.Array, latent: jax.Array, rope: jax.Array, slots: jax.Array) -> Arrays:
        pool = cache.append(pool, latent, rope, slots)
        table, lengths = jnp.zeros((1, 1), jnp.int32), jnp.full(1, 3, jnp.int32)
        return pool, cache.gather(pool, table, lengths)

    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _ffi.TARGETS]
    arrays = jnp.zeros((1, 64, 1, 576)), jnp.ones((1, 512)), jnp.ones((1, 64)), jnp.int32([2])
    half = [x.astype(jnp.float16) if x.dtype == jnp.float32 else x for x in arrays]
    export = jax.export.export(jax.jit(step), platforms=("cpu", "cuda"), disabled_checks=allowed)
    exported = jax.export.deserialize(export(*half).serialize())
    for got, expected in zip(exported.call(*half), step(*half), strict=True):
        np.testing.assert_array_equal(got, expected)
