"""Copies of pages within a pool, alone and as the page allocator asks for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import cache
from jax_flashmla.pages import PagePool

LAYERS, PAGES = 3, 8


def pool(layers: int = 1) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((layers * PAGES, 64, 1, 576), np.float32)
    return values.astype(np.float16)


def test_every_layer_copies_its_own_pages() -> None:
    before = pool(LAYERS)
    copies = np.array([[1, 4], [-1, -1], [1, 0], [7, 5]], np.int32)
    expected = before.reshape(LAYERS, PAGES, 64, 1, 576).copy()
    for source, destination in ((1, 4), (1, 0), (7, 5)):
        expected[:, destination] = expected[:, source]
    got = jax.jit(cache.copy_pages, static_argnames="num_pages")(before, copies, num_pages=PAGES)
    np.testing.assert_array_equal(got, expected.reshape(before.shape))


@pytest.mark.parametrize(
    "bad", [(-1, -1), (-1, 2), (2, -1), (PAGES, 2), (2, PAGES), (2**31 - 1, 0)]
)
def test_pair_outside_the_pool_copies_nothing(bad: tuple[int, int]) -> None:
    before = pool()
    got = cache.copy_pages(before, np.array([bad], np.int32))
    np.testing.assert_array_equal(got, before)


def test_no_copies_at_all_change_nothing() -> None:
    before = pool()
    np.testing.assert_array_equal(cache.copy_pages(before, np.zeros((0, 2), np.int32)), before)


def test_shared_requests_diverge_in_the_cache() -> None:
    allocator, held = PagePool(PAGES, max_pages_per_seq=4), jnp.zeros((PAGES, 64, 1, 576))
    allocator.add("a")
    tokens = {"a": np.arange(100.0), "b": np.arange(100.0)}

    def append(names: list[str], start: float, count: int) -> jax.Array:
        writes = allocator.append(dict.fromkeys(names, count))
        rows = [start + 10 * i + np.arange(count) for i in range(len(names))]
        for name, row in zip(names, rows, strict=True):
            tokens[name] = np.concatenate([tokens[name], row])
        latent = np.concatenate(rows).astype(np.float32)[:, None] * np.ones((1, 512), np.float32)
        copied = cache.copy_pages(held, writes.copies)
        return cache.append(copied, latent, latent[:, :64], writes.slots.reshape(-1))

    tokens["a"] = tokens["a"][:0]
    held = append(["a"], 0.0, 100)
    allocator.fork("a", "b")
    held = append(["a", "b"], 500.0, 3)
    rows = allocator.rows(["a", "b"])
    got = cache.gather(held, rows.block_table, rows.cache_seqlens)
    for row, name in enumerate("ab"):
        np.testing.assert_array_equal(got[row, :103, 0, 0], tokens[name].astype(np.float32))


def test_a_donated_pool_is_not_copied() -> None:
    shape = (LAYERS * PAGES, 64, 1, 576)
    jitted = jax.jit(cache.copy_pages, static_argnames="num_pages", donate_argnums=0)
    described = (
        jax.ShapeDtypeStruct(shape, jnp.float16),
        jax.ShapeDtypeStruct((5, 2), jnp.int32),
    )
    compiled = jitted.lower(*described, num_pages=PAGES).compile()
    made = re.findall(rf"= f16\[{LAYERS * PAGES},64,1,576\]\S* (\w+)\(", compiled.as_text())
    assert "copy" not in made
    one_page_of_each_layer = 2 * LAYERS * 64 * 576
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one_page_of_each_layer


@pytest.mark.parametrize(
    ("copies", "num_pages", "error", "message"),
    [
        (np.zeros((2, 3), np.int32), None, ValueError, "copies"),
        (np.zeros((2, 2), np.int16), None, TypeError, "copies"),
        (np.zeros((2, 2), np.int32), 3, ValueError, "num_pages: got 3, expected a divisor"),
        (np.zeros((2, 2), np.int32), 0, ValueError, "num_pages"),
    ],
)
def test_bad_arguments_are_named(
    copies: np.ndarray, num_pages: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cache.copy_pages(pool(), copies, num_pages=num_pages)
