"""Which device holds which page: counts, tables and slots against a loop over tokens."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.context_parallel import split_block_table, split_seqlens, split_slots
from jax_flashmla.pages import PagePool

DEVICES = (1, 2, 3, 4, 8)
NAMESPACES = [np.asarray, jnp.asarray]


@pytest.mark.parametrize("array", NAMESPACES, ids=["numpy", "jax"])
@pytest.mark.parametrize("n", DEVICES)
def test_each_token_is_held_once(n: int, array: Callable) -> None:
    lengths = np.array([-5, 0, 1, 63, 64, 65, 128, 191, 640, 700, 1300], np.int32)
    held = split_seqlens(array(lengths), n)
    expected = [[sum((t // 64) % n == d for t in range(x)) for x in lengths] for d in range(n)]
    np.testing.assert_array_equal(held, expected)
    assert held.dtype == jnp.int32


@pytest.mark.parametrize("n", DEVICES)
def test_no_device_holds_a_page_more_than_another(n: int) -> None:
    held = split_seqlens(np.arange(2000, dtype=np.int32), n)
    assert (held.max(axis=0) - held.min(axis=0)).max() <= 64


@pytest.mark.parametrize("array", NAMESPACES, ids=["numpy", "jax"])
@pytest.mark.parametrize("n", DEVICES)
def test_columns_are_dealt_out_in_turn(n: int, array: Callable) -> None:
    table = np.arange(10, dtype=np.int32).reshape(2, 5)
    tables = split_block_table(array(table), n)
    assert tables.shape == (n, 2, -(-5 // n))
    for page in range(5):
        np.testing.assert_array_equal(tables[page % n, :, page // n], table[:, page])
    assert int((np.asarray(tables) == -1).sum()) == tables.size - table.size


@pytest.mark.parametrize("array", NAMESPACES, ids=["numpy", "jax"])
@pytest.mark.parametrize("n", DEVICES)
def test_a_token_has_a_slot_on_the_device_of_its_page(n: int, array: Callable) -> None:
    table = np.array([[7, 3, 9, 1, 4], [2, 8, -1, 0, 5]], np.int32)
    positions = np.array([[0, 64, 319, -1], [63, 130, 320, 9000]], np.int32)
    slots = np.asarray(split_slots(split_block_table(array(table), n), array(positions)))
    places = {(0, 0): 7 * 64, (0, 1): 3 * 64, (0, 2): 4 * 64 + 63, (1, 0): 2 * 64 + 63}
    expected = np.full((n, 2, 4), -1)
    for (row, column), slot in places.items():
        expected[positions[row, column] // 64 % n, row, column] = slot
    np.testing.assert_array_equal(slots, expected)


def test_tables_without_a_column_have_no_slot() -> None:
    slots = split_slots(np.zeros((2, 1, 0), np.int32), np.zeros((1, 3), np.int32))
    np.testing.assert_array_equal(slots, np.full((2, 1, 3), -1))


@pytest.mark.parametrize("n", DEVICES)
def test_one_allocator_per_device_keeps_the_books_of_a_sequence(n: int) -> None:
    rng, names, lengths = np.random.default_rng(n), ["a", "b"], np.zeros(2, np.int32)
    pools = [PagePool(40, max_pages_per_seq=20) for _ in range(n)]
    for name in names:
        for pool in pools:
            pool.add(name)
    written: list[set[int]] = [set() for _ in range(n)]
    for _ in range(12):
        new = rng.integers(0, 90, 2).astype(np.int32)
        grown = split_seqlens(lengths + new, n) - split_seqlens(lengths, n)
        own = []
        for pool, counts in zip(pools, grown, strict=True):
            own.append(pool.append(dict(zip(names, counts, strict=True)), width=90).slots)
        tables = np.stack([pool.rows(names).block_table for pool in pools])
        steps = np.arange(90, dtype=np.int32)[None]
        positions = np.where(steps < new[:, None], lengths[:, None] + steps, -1).astype(np.int32)
        slots = split_slots(tables, positions)
        assert ((slots >= 0).sum(axis=0) == (positions >= 0)).all()  # on one device each
        for device in range(n):
            got = set(slots[device][slots[device] >= 0].tolist())
            assert got == set(own[device][own[device] >= 0].tolist())
            assert not got & written[device]
            written[device] |= got
        lengths += new
    rows = [pool.rows(names).cache_seqlens for pool in pools]
    np.testing.assert_array_equal(rows, split_seqlens(lengths, n))


BAD = {
    "block_table: got shape [3], expected [b, max_pages_per_seq]": lambda: split_block_table(
        np.zeros(3, np.int32), 2
    ),
    "block_table: got float32, expected int32": lambda: split_block_table(
        np.zeros((1, 3), np.float32), 2
    ),
    "num_devices: got 0, expected at least 1": lambda: split_seqlens(np.zeros(3, np.int32), 0),
    "positions: got shape [3, 1], expected [2, s]": lambda: split_slots(
        np.zeros((4, 2, 1), np.int32), np.zeros((3, 1), np.int32)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message]()
    assert str(error.value) == message
