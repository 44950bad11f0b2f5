"""The benchmark over meshes: what is counted and told, and that it runs. Nothing is about speed."""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from quick_script import BENCHMARKS, run_quick

ENV = {"device": "a card", "date": "today", "commit": "none", "command": "python mesh.py"}


def row(name: str, **us: float) -> dict:
    way, shape, heads, _ = name.split("/")
    batch, seqlen = shape.split("x")
    programs = {"alone, GPU 0": 100.0, "alone, GPU 1": 102.0} | us
    return {
        "row": name,
        "way": way,
        "h_q": int(heads.removeprefix("h")),
        "batch": int(batch),
        "seqlen": int(seqlen),
        "programs": {name: {"us": value} for name, value in programs.items()},
    }


def result(**changed: object) -> dict:
    context = {"attention on 2": 50.0, "gather, in a scan on 2": 57.0}
    for i, name in enumerate(("gather", "direct", "heads")):
        whole, merge = 56.5 + i, 7.0 + i
        context |= {f"{name} on 2": whole, f"{name}, captured on 2": whole - 0.5}
        context |= {f"merge, {name} on 2": merge, f"merge, {name}, captured on 2": merge - 1}
    heads = {"on 2": 70.0, "64 heads alone, GPU 0": 66.0}
    entry = {"what": "append", "kind": "Auto", "devices": 2, "passed": 3, "total": 3, "wrong": []}
    made = {
        "kind": "mesh",
        "env": ENV,
        "devices": [1, 2],
        "equality": [entry, entry | {"kind": "Explicit"}],
        "rows": [
            row("requests/128x8192/h16/s1", **{"on 2": 103.0}),
            row("heads/128x8192/h128/s1", **heads),
            row("context/8x131072/h128/s1", **context),
        ],
    }
    return made | changed


def test_each_way_is_held_against_one_gpu(load: Callable[[str], ModuleType]) -> None:
    lines = {line.goal: line for line in load("mesh_report").lines(result())}
    weak = lines["requests/128x8192/h16/s1 on 2: over one GPU"]
    assert (round(weak.reached, 3), weak.verdict) == (1.020, "must")
    heads = lines["heads/128x8192/h128/s1 on 2: over one GPU"]
    assert (round(heads.reached, 3), heads.verdict) == (1.061, "NO")
    context = lines["context/8x131072/h128/s1 on 2: speed-up"]
    assert (round(context.reached, 3), context.verdict) == (1.804, "must")
    assert context.where == "gather, captured"


def test_a_wrong_result_is_told(load: Callable[[str], ModuleType]) -> None:
    wrong = {"what": "append", "kind": "Auto", "devices": 2, "passed": 2, "total": 3}
    told = load("report").text([result(equality=[wrong])])
    assert "| append | Auto | 2/3 |" in told
    assert "| results over meshes other than one GPU's, of 3 | 0.00 | - | 1.00 | NO |" in told


def test_calls_inside_a_loop_are_told_apart(load: Callable[[str], ModuleType]) -> None:
    call = 'custom-call(%x), custom_call_target="jax_flashmla_schedule"'
    merge = 'custom-call(%x), custom_call_target="jax_flashmla_merge"'
    text = "\n".join(
        [
            "HloModule jit_run",
            f"%region_0.1 (p: s32[]) -> s32[] {{\n  %a = {call}\n  %b = {merge}\n}}",
            f"%other (p: s32[]) -> s32[] {{\n  ROOT %c = {call}\n}}",
            "ENTRY %main (p: s32[]) -> s32[] {\n  %d = all-gather-start(%x)",
            "  %w = while(%t), condition=%cond, body=%region_0.1\n}",
        ]
    )
    counts = load("mesh_times").count(text)
    assert counts == {
        "all-gather": 1,
        "jax_flashmla_merge": 1,
        "jax_flashmla_schedule": 2,
        "schedules in a loop": 1,
    }


def test_plot_is_drawn(load: Callable[[str], ModuleType], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "mesh.png"
    load("mesh_report").draw(result(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_script_runs_on_tiny_shapes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "result.json"
    words = ["--devices", "2", "--no-equality", "--processes", "2"]
    found = run_quick("mesh.py", out, *words, "--rows", "requests/*h16*,context/1x131072*")
    assert [x["way"] for x in found["rows"]] == ["requests", "context"]
    assert [(x["passed"], x["total"]) for x in found["equality"]] == [(4, 4), (4, 4)]
    programs = found["rows"][1]["programs"]
    assert all(program["us"] > 0 for program in programs.values())
    collectives = {name: program["compiled"] for name, program in programs.items()}
    assert collectives["attention on 2"] == {}
    assert set(collectives["gather on 2"]) == {"all-gather"}
    assert set(collectives["direct on 2"]) == {"all-gather"}  # there is no kernel
    assert set(collectives["direct, in a scan on 2"]) == {"all-gather"}
    assert set(collectives["merge, heads on 2"]) == {"all-gather", "all-to-all"}
    report = [sys.executable, str(BENCHMARKS / "report.py"), str(out)]
    told = subprocess.run(report, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "| 16 | 1 × 130 | 2 |" in told
