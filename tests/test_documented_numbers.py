"""The numbers in the READMEs are those of the results and of the GPU record."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from gpu_record import RECORD
from quick_script import BENCHMARKS

RESULTS = BENCHMARKS / "results"
README = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
PAGE = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
TABLES = {
    "decode": ("decode", "decode-2", "decode-3", "decode-4"),
    "mesh": ("mesh",),
}
GOALS = {
    "16 × 4096": ("heads-16",),
    "128 × 4096": ("heads-128",),
    "": ("overhead", "trace-25", "trace-50", "trace-100"),
}
MODELS = {"v3": "V3", "v2lite": "V2-Lite"}


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"h200-layer-stack-{name}.json").read_text())["rows"]


def report(names: tuple[str, ...]) -> str:
    files = [str(RESULTS / f"h200-{name}.json") for name in names]
    command = [sys.executable, BENCHMARKS / "report.py", *files]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_documented(lines: list[str]) -> None:
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 3  # a head, and what is below it
    documented = PAGE.splitlines()
    assert [line for line in table if line not in documented] == []


@pytest.mark.parametrize("what", TABLES)
def test_page_has_the_tables_of_the_report(what: str) -> None:
    assert_documented(report(TABLES[what]).splitlines())


@pytest.mark.parametrize("rows_of", GOALS)
def test_page_has_the_goals_of_the_other_runs(rows_of: str) -> None:
    goals = report(GOALS[rows_of]).split("| goal |")[1].split("\n\n")[0]
    assert_documented(
        [
            line.replace("other head counts:", f"other head counts, {rows_of}:")
            for line in f"| goal |{goals}".splitlines()
        ]
    )


@pytest.mark.parametrize("name", MODELS)
def test_page_has_what_a_layers_time_goes_to(load: Callable[[str], ModuleType], name: str) -> None:
    _, _, *table = load("layer_stack").layer_table(rows(name)).splitlines()
    for line in table:
        assert line.replace(name, MODELS[name]) in PAGE


@pytest.mark.parametrize("name", MODELS)
def test_readme_has_the_steps_of_all_layers(name: str) -> None:
    with_xla = {  # at batch 1 from before a single row was sent twice
        (row["batch"], row["seqlen"]): row["xla_us"]
        for row in rows(f"{name}-xla")
        if row["batch"] > 1
    }
    for row in rows(name):
        where = f"{MODELS[name]}, {row['layers']} layers, {row['batch']} × {row['seqlen']}"
        shared = f", {row['sharers']} share pages" if row["shared_pages"] else ""
        xla_us = None if shared else with_xla.get((row["batch"], row["seqlen"]))
        xla = f"{xla_us / 1e3:.2f}" if xla_us else "-"
        times = f"{row['us'] / 1e3:.2f} | {row['kernels_us'] / 1e3:.2f} | {xla}"
        assert f"| {where}{shared} | {times} | {row['over_floors']:.2f} |" in README
    within = sum(row["over_floors"] <= 1.25 for model in MODELS for row in rows(model))
    assert within == 1
    assert "One row of twelve is within the goal of 1.25" in README


def test_readme_has_the_times_of_the_cache_operations() -> None:
    measured = json.loads((RESULTS / "h200-cache-ops.json").read_text())["rows"]
    by_name = {row["row"]: row for row in measured}
    text = README.replace("\n", " ")
    for words, name in (
        ("append 131,072 rows {} us ({} of copy bandwidth)", "append/131072"),
        ("with rotation {} us ({})", "rotated/131072"),
        ("`append_projected` {} us ({})", "projected/131072"),
        ("gather 128 × 4096 tokens {} us ({})", "gather/128x4096"),
        ("merge 8 × 32,768 partials {} us ({}: it mostly reads)", "merge/8x32768"),
    ):
        row = by_name[name]
        assert words.format(f"{row['us']:.0f}", f"{row['share_of_copy']:.0%}") in text
    small = [row["us"] for row in measured if row["goal"].endswith("us")]
    assert f"Small ones take {min(small):.1f} to {max(small):.1f} us" in text


def test_readme_counts_the_checks_of_the_gpu_record() -> None:
    record = json.loads(Path(RECORD).read_text())
    if "pending" in record:
        pytest.skip("a run is owed")
    passed = sum(group["passed"] for group in record["groups"])
    assert f"`make gpu-test` ran {passed:,} checks and all passed" in README
    grid = sum(x["passed"] for x in record["groups"] if x["name"].startswith("grid"))
    assert f"{grid:,} cases of a correctness grid" in README


def test_readme_counts_the_comparisons_over_meshes() -> None:
    result = json.loads((RESULTS / "h200-mesh.json").read_text())
    passed, total = (sum(x[key] for x in result["equality"]) for key in ("passed", "total"))
    assert passed == total
    assert re.search(rf"All {total} comparisons gave what one GPU gives", README)
