import pytest

from jax_flashmla._roofline import H200, Ceilings, Work, known_ceilings


def test_bytes_are_cache_queries_and_outputs() -> None:
    work = Work(tokens=1000, unique_tokens=1000, batch=2, s_q=3, h_q=5)
    assert work.bytes == 1000 * 576 * 2 + 2 * 3 * 5 * (576 + 512) * 2


def test_shared_pages_are_moved_once_and_computed_for_each() -> None:
    alone = Work(tokens=640, unique_tokens=640, batch=2, s_q=1, h_q=16)
    shared = Work(tokens=640, unique_tokens=320, batch=2, s_q=1, h_q=16)
    assert shared.unique_kv_bytes * 2 == shared.kv_bytes == alone.kv_bytes
    assert shared.flop == alone.flop == 2 * 16 * 640 * 1088


def test_floor_is_the_slower_of_moving_and_computing() -> None:
    work = Work(tokens=100, unique_tokens=100, batch=1, s_q=1, h_q=1)
    memory_bound = Ceilings("", bytes_per_s=1.0, flop_per_s=1e30)
    compute_bound = Ceilings("", bytes_per_s=1e30, flop_per_s=1.0)
    assert work.floor_seconds(memory_bound) == work.bytes
    assert work.floor_seconds(compute_bound) == work.flop


@pytest.mark.parametrize(("itemsize", "factor"), [(2, 1), (4, 2)])
def test_bytes_follow_the_dtype(itemsize: int, factor: int) -> None:
    assert Work(64, 64, 1, 1, 1, itemsize).bytes == factor * Work(64, 64, 1, 1, 1).bytes


def test_ceilings_are_only_known_where_measured() -> None:
    assert known_ceilings("NVIDIA H200") is H200
    assert known_ceilings("cpu") is None
