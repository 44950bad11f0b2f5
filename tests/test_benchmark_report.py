"""What the benchmark's report makes of numbers, and how its contenders take turns."""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from jax_flashmla._roofline import H200

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
TABLE = json.loads((BENCHMARKS / "peers-h200.json").read_text(encoding="utf-8"))["rows"]
ENV = {"device": "a card", "date": "today", "commit": "none", "command": "python decode.py"}
LIMITS = {"read_gbps": 4600.0, "matmul_tflops": 787.0}
# FA3's operations as the library declares them, names only.
FWD = (
    "q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
    "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
    "seqlens_rotary q_descale k_descale v_descale softmax_scale is_causal window_size_left "
    "window_size_right softcap is_rotary_interleaved scheduler_metadata num_splits pack_gqa "
    "sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k "
)


def run(
    load: Callable[[str], ModuleType], time_of: Callable[[dict], float], **changed: object
) -> dict:
    """A result of decode.py with all rows, ours taking ``time_of(table row)`` us."""
    works = [row.work for row in load("workload").load_rows()]
    rows = [
        {
            **{name: entry[name] for name in ("h_q", "s_q", "batch", "seqlen")},
            "bytes": work.bytes,
            "flop": work.flop,
            "us": time_of(entry),
            "xla_us": None,
            "peers_us": {},
            "card": None,
        }
        for entry, work in zip(TABLE, works, strict=True)
    ]
    result = {"kind": "decode", "env": ENV, "ceilings": LIMITS, "left_out": {}, "rows": rows}
    return result | changed


def lines(load: Callable[[str], ModuleType], *results: dict) -> dict[str, object]:
    judged = load("judge").judge(list(results))
    return {line.goal: line for line in load("goals").decode_lines(judged)}


def test_best_peers_times_are_as_far_from_the_floor_as_their_table_says(
    load: Callable[[str], ModuleType],
) -> None:
    rows = load("judge").judge([run(load, lambda entry: entry["best_us"])])
    assert all(row.ratio == 1 for row in rows)
    groups = ([r for r in rows if r.batch >= 32], [r for r in rows if r.batch <= 16], rows)
    means = [1 / statistics.geometric_mean(row.share for row in group) for group in groups]
    assert means == pytest.approx([1.25, 3.16, 1.79], abs=0.006)


def test_floor_follows_the_runs_ceilings(load: Callable[[str], ModuleType]) -> None:
    limits = {"read_gbps": 2300.0, "matmul_tflops": 393.5}
    result = run(load, lambda entry: entry["best_us"], ceilings=limits)
    for row, work in zip(load("judge").judge([result]), load("workload").load_rows(), strict=True):
        assert row.floor_us == pytest.approx(2e6 * work.work.floor_seconds(H200))
        assert row.table_tflops == pytest.approx(2 * row.tflops)


def test_peers_that_did_not_run_are_scaled_by_fa3(load: Callable[[str], ModuleType]) -> None:
    result = run(load, lambda entry: entry["best_us"])
    for row, entry in zip(result["rows"], TABLE, strict=True):
        row["peers_us"] = {"fa3": 1.1 * entry["peers_us"]["fa3"]}
    assert load("judge").factor(result) == pytest.approx(1.1)
    assert all(row.ratio == pytest.approx(1 / 1.1) for row in load("judge").judge([result]))


def test_flashmla_of_another_day_counts_only_where_it_ran(
    load: Callable[[str], ModuleType],
) -> None:
    result = run(load, lambda entry: entry["best_us"])
    result["rows"][0]["peers_us"] = {"vllm_flashmla": 1.0}
    best = [row.best_peer for row in load("judge").judge([result])]
    assert best[0] == "vllm_flashmla"
    assert "vllm_flashmla" not in best[1:]


def test_rows_are_medians_over_runs(load: Callable[[str], ModuleType]) -> None:
    runs = [run(load, lambda entry, by=by: by * entry["best_us"]) for by in (0.9, 1.3, 1.0)]
    judged = load("judge").judge(runs)
    assert all(row.ratio == pytest.approx(1.0) for row in judged)
    assert lines(load, *runs)["rows slower than the best peer, of 62"].verdict == "must"


def test_tie_is_wider_where_arithmetic_binds(load: Callable[[str], ModuleType]) -> None:
    result = run(load, lambda entry: 1.04 * entry["best_us"])
    rows = load("judge").judge([result])
    assert all(row.slower != row.compute_bound for row in rows)
    line = lines(load, result)["rows slower than the best peer, of 62"]
    assert (line.reached, line.verdict) == (sum(not row.compute_bound for row in rows), "NO")


def test_limits_are_reached_exactly_at_the_limit(load: Callable[[str], ModuleType]) -> None:
    goals = load("goals")
    verdicts = [goals.Line("", value, 1.15, 1.25).verdict for value in (1.1, 1.15, 1.25, None)]
    assert verdicts == ["NO", "must", "aim", "not measured"]
    verdicts = [goals.Line("", us, 11, 8.5, higher=False).verdict for us in (11.1, 11, 8.5)]
    assert verdicts == ["NO", "must", "aim"]


def test_the_worst_row_of_a_cell_decides(load: Callable[[str], ModuleType]) -> None:
    def time_of(entry: dict) -> float:
        return 8.0 if (entry["h_q"], entry["s_q"]) == (64, 2) else 20.0

    line = lines(load, run(load, time_of))["1 × 4096, R = 128: us"]
    assert (line.reached, line.where, line.verdict) == (20.0, "1x4096/h128/s1", "NO")


def test_every_goal_of_the_table_is_judged(load: Callable[[str], ModuleType]) -> None:
    """Twice as fast as the floor: all reached, none left unmeasured."""
    found = lines(load, run(load, lambda entry: entry["floor_us"] / 2))
    assert len(found) == 3 + 10 + 8 + 12
    unreached = {goal: line.verdict for goal, line in found.items() if line.verdict != "aim"}
    assert set(unreached.values()) == {"must"}  # the line that has no aim
    assert len(unreached) == 1


def test_cliff_between_head_counts_is_found(load: Callable[[str], ModuleType]) -> None:
    result = run(load, lambda entry: entry["s_q"] * entry["h_q"])
    odd = dict(result["rows"][2], h_q=20)  # 128 x 4096: next tabled R is 32
    heads = [row for row in result["rows"] if (row["batch"], row["seqlen"]) == (128, 4096)]
    goals, judge = load("goals"), load("judge")
    for us, verdict in ((33.6, "must"), (33.7, "NO")):
        measured = result | {"kind": "heads", "rows": [*heads, odd | {"us": us}]}
        assert goals.head_lines(judge.judge([measured]))[0].verdict == verdict
        told = load("report").text([measured])
        assert f"| 1.05 | - | 1.05 | {verdict} |" in told


def test_report_tells_all_kinds(load: Callable[[str], ModuleType]) -> None:
    batch = {"tpot_ms": 50, "h_q": 128, "time_s": 1.0, "requests": 2, "tokens": 3, "error": 0.9}
    batch |= {"bytes": 4.65e9, "flop": 1, "us": 1200.0, "kernels_us": 1100.0, "busiest": 1.04}
    trace = {"kind": "trace", "env": ENV, "ceilings": LIMITS, "batches": [batch]}
    overhead = {
        "kind": "overhead",
        "env": ENV,
        "rows": [{"row": "a", "overhead_us": 1.2}],
        "metadata_us": {"128": 3.5},
    }
    told = load("report").text([run(load, lambda entry: entry["best_us"]), overhead, trace])
    assert "| 61 layers in one jit: us above the kernels | 1.30 | 1.10 | 1.20 | must |" in told
    assert "| schedule at batch 128, us | 3.00 | 2.20 | 3.50 | NO |" in told
    assert "| trace, R = 128: share of floor | 78.0% | 84.0% | 90.9% | aim |" in told
    assert "| trace: busiest part over the mean | 1.05 | - | 1.04 | must |" in told


def test_plot_is_drawn(load: Callable[[str], ModuleType], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.png"
    load("plot").draw([run(load, lambda entry: entry["best_us"])], path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("sleeping_clock")
def test_lanes_take_turns_and_each_gets_its_own_time(load: Callable[[str], ModuleType]) -> None:
    lanes, log = load("lanes"), []

    def lane(name: str, milliseconds: float) -> object:
        def start() -> None:
            log.append(name)
            time.sleep(milliseconds / 1e3)

        return lanes.Lane(name, 2, start, lambda: None)

    turns = lanes.Turns(rounds=3, seconds=0.01, rest=0.0)
    timings = lanes.interleave([lane("slow", 20), lane("fast", 5)], turns)
    # Each to begin with, then in rounds that another one begins each time.
    order = [name for name, before in zip(log, [None, *log], strict=False) if name != before]
    assert order == ["slow", "fast", "slow", "fast", "slow", "fast"]
    assert timings["slow"].median == pytest.approx(0.010)
    assert timings["fast"].median == pytest.approx(0.0025)


@pytest.mark.usefixtures("sleeping_clock")
def test_first_run_behind_a_rest_does_not_count_where_jax_starts_it(
    load: Callable[[str], ModuleType],
) -> None:
    lanes = load("lanes")
    turns = lanes.Turns(rounds=3, seconds=0.01, rest=0.5)

    def lane(*, through_jax: bool) -> object:
        last = -1.0

        def start() -> None:
            nonlocal last
            rested = time.perf_counter() - last > turns.rest / 2
            time.sleep(0.004 + 0.001 * rested)
            last = time.perf_counter()

        return lanes.Lane("lane", 1, start, lambda: None, through_jax=through_jax)

    exact = lanes.interleave([lane(through_jax=True)], turns)["lane"].median
    assert exact == pytest.approx(0.004)
    short = lanes.interleave([lane(through_jax=False)], turns)["lane"].median
    assert short < 0.0038


def test_rows_of_several_results_are_all_judged(load: Callable[[str], ModuleType]) -> None:
    whole, cut = (run(load, lambda entry, by=by: by * entry["best_us"]) for by in (1.0, 1.2))
    cut["rows"] = cut["rows"][:-1]
    judged = load("judge").judge([cut, whole])
    assert [row.ratio for row in judged] == pytest.approx([1.1] * 61 + [1.0])


def test_state_of_the_card_is_the_median_since_a_row_began(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    card, clock = load("card"), iter(range(100, 10_000, 10))
    power = SimpleNamespace(value=SimpleNamespace(uiVal=500_000))
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_FI_DEV_POWER_INSTANT=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=lambda device, kind: next(clock),  # noqa: ARG005
        nvmlDeviceGetFieldValues=lambda device, fields: [power],  # noqa: ARG005
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    begun = time.perf_counter()
    with card.Sampler() as sampler:
        time.sleep(0.1)
    seen = next(clock) - 10
    assert sampler.since(begun) == card.State(sm_mhz=(100 + seen) / 2, watts=500)
    assert sampler.since(time.perf_counter()) is None


def test_arguments_of_fa3_are_all_known_to_its_operation(
    load: Callable[[str], ModuleType],
) -> None:
    peers = load("peers")
    names = FWD.split()
    assert len(names) == 37
    array = np.zeros((2, 2, 16, 512), np.float32)
    problem = peers.Problem(array, array[..., :64], np.zeros((3, 64, 1, 576)), (), np.zeros(2))
    schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in names])
    given = peers._by_name(SimpleNamespace(_schema=schema), peers.fa3_arguments(problem))
    assert list(given) == names
    assert given["k"].shape == (3, 64, 1, 64)
    assert given["v"].shape == (3, 64, 1, 512)
    assert given["is_causal"] is True
    with pytest.raises(RuntimeError, match="takes no"):
        peers._by_name(SimpleNamespace(_schema=schema), {"qv": array})
