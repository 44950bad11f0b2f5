"""The benchmark of the cache operations: its sizes, and that it runs. Nothing is about speed."""

import pathlib
from collections.abc import Callable
from types import ModuleType

import jax
import pytest
from quick_script import run_quick


@pytest.fixture
def cache_ops(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("cache_ops")


def test_bytes_are_those_of_the_arrays(cache_ops: ModuleType) -> None:
    rows = ("rotated", (70,)), ("append", (3,)), ("gather", (2, 128)), ("merge", (3, 5))
    for kind, sizes in rows:
        row = cache_ops.Row(kind, sizes, large=True)
        function, arguments = cache_ops.make_call(row)
        results = jax.tree.leaves(jax.eval_shape(function, *arguments))
        if kind == "gather":
            moved = 2 * results[0].size * 2
        elif kind == "merge":
            moved = sum(x.size * x.dtype.itemsize for x in (*arguments, *results))
        else:  # the rows, which are also what is written to the pool
            read = sum(x.nbytes for x in arguments[1:])
            moved = read + sum(x.nbytes for x in arguments[1:3])
        assert row.bytes == moved


def test_script_runs_on_tiny_sizes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "result.json"
    result = run_quick("cache_ops.py", out, "--rows", "*/*x16,app*")
    names = {row["row"] for row in result["rows"]}
    assert names == {"append/1", "append/70", "merge/2x16", "merge/64x16"}
    assert all(row["us"] > 0 for row in result["rows"])
