"""The benchmark's own inputs, and that its scripts run. Nothing here is about speed."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np
import pytest
from quick_script import BENCHMARKS, run_quick

from jax_flashmla._roofline import H200

PEERS = json.loads((BENCHMARKS / "peers-h200.json").read_text(encoding="utf-8"))


@pytest.fixture
def workload(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("workload")


def test_peer_table_is_complete() -> None:
    shapes = [(row["h_q"], row["s_q"], row["batch"], row["seqlen"]) for row in PEERS["rows"]]
    assert len(shapes) == len(set(shapes)) == 62
    names = set(PEERS["about"]["peers"])
    assert all(set(row["peers_us"]) == names for row in PEERS["rows"])


def test_best_peer_is_the_fastest_of_one_run() -> None:
    for row in PEERS["rows"]:
        times = {name: us for name, us in row["peers_us"].items() if name != "vllm_flashmla"}
        assert row["best_us"] == min(us for us in times.values() if us is not None)


def test_floor_is_the_tables(workload: ModuleType) -> None:
    for row, entry in zip(workload.load_rows(), PEERS["rows"], strict=True):
        room = 0.051 if isinstance(row.seqlen, int) else 2e-3 * entry["floor_us"]
        assert row.work.floor_seconds(H200) * 1e6 == pytest.approx(entry["floor_us"], abs=room)


def test_rates_of_the_best_peer_are_the_tables(workload: ModuleType) -> None:
    for row, entry in zip(workload.load_rows(), PEERS["rows"], strict=True):
        room = 6e-3 if row.best_us < 50 else 3e-3
        assert row.work.bytes / row.best_us / 1e3 == pytest.approx(entry["best_gbps"], rel=room)


def test_varying_lengths_spread_like_the_normal(workload: ModuleType) -> None:
    row = workload.Row(16, 2, 128, "var4096")
    assert row.lengths.mean() == pytest.approx(4113, abs=10)
    assert row.lengths.min() == row.s_q
    assert np.quantile(row.lengths, [0.1587, 0.8413]) == pytest.approx([2048, 6144], rel=0.03)


def test_patterns_select_rows(workload: ModuleType) -> None:
    names = [row.name for row in workload.load_rows("1x4096/h16/*,128xvar4096/h128/s2")]
    assert names == ["1x4096/h16/s1", "1x4096/h16/s2", "128xvar4096/h128/s2"]


def test_sets_of_a_row_share_no_page(workload: ModuleType) -> None:
    row = workload.Row(1, 1, 3, "var96")
    total = int(row.pages.sum())
    tables = workload.make_inputs(row, row.sets * total).tables
    pages = np.concatenate([np.asarray(table)[np.asarray(table) >= 0] for table in tables])
    assert len(tables) == row.sets
    assert sorted(pages) == list(range(row.sets * total))


def test_chain_is_nothing_but_calls_of_the_kernel(load: Callable[[str], ModuleType]) -> None:
    workload, contenders = load("workload"), load("contenders")
    row = workload.Row(16, 2, 2, 130)
    pool = workload.make_pool([row])
    inputs = workload.make_inputs(row, pool.shape[0])
    run = jax.jit(contenders.chained(contenders.ours, 5))
    lowered = run.trace(
        inputs.q_latent,
        inputs.q_rope,
        pool,
        inputs.tables,
        inputs.cache_seqlens,
        inputs.schedule,
    ).lower(lowering_platforms=("cuda",))
    operations = re.findall(r"= \"?(stablehlo\.\w+ ?@?\w*|\w*call)", lowered.as_text())
    assert operations == ["stablehlo.custom_call @jax_flashmla_decode"] * 5


def test_a_runner_is_not_asked_where_there_is_no_gpu(load: Callable[[str], ModuleType]) -> None:
    assert load("ceilings").read_gbps(pathlib.Path(sys.executable)) is None  # would fail if run


QUICK = {
    "decode.py": ["--rows", "128xvar*/h16/s1"],
    "overhead.py": ["--rows", "128xvar*/h16/s1"],
    "trace_batches.py": ["--heads", "4"],
}


@pytest.mark.parametrize("script", QUICK)
def test_script_runs_on_tiny_shapes(script: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "result.json"
    result = run_quick(script, out, *QUICK[script])
    report = [sys.executable, str(BENCHMARKS / "report.py"), str(out)]
    told = subprocess.run(report, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "| goal | must | aim | reached | verdict |" in told
    if script == "decode.py":
        (row,) = result["rows"]
        assert row["us"] > 0
        assert row["xla_us"] > 0
        assert row["jit_us"] == row["us"]
        assert set(result["left_out"]) == {"jax_flashmla replayed", "vllm_flashmla", "fa3"}
    if script == "trace_batches.py":
        assert [batch["tpot_ms"] for batch in result["batches"]] == [25, 50, 100]
        assert {batch["kernels_us"] for batch in result["batches"]} == {None}  # there is no GPU
