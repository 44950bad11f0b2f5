"""The recorded GPU run stands for the sources as they are, or says in words why a run is owed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_record
import pytest
from gpu_groups import GROUPS, ROOT, Group
from gpu_run import Count, run_group

import jax_flashmla

SHA256 = "a" * 64
REASON = "no GPU was to be had today"
ON_CPU = {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1]),
}


def row(name: str, **changes: object) -> dict[str, object]:
    return dataclasses.asdict(Count(name, passed=2000)) | changes


def record(**changes: object) -> gpu_record.Record:
    """A good record, with changes."""
    about = dict.fromkeys((*gpu_record.ENVIRONMENT, "date"), "some")
    groups = [row(group.name) for group in GROUPS]
    return {"cuda_sha256": SHA256, **about, "groups": groups} | changes


def test_recorded_run_stands_for_the_sources() -> None:
    assert gpu_record.RECORD.exists(), "run python tests/gpu_record.py, or note why: --pending"
    found = gpu_record.problems(gpu_record.load(gpu_record.RECORD), gpu_record.sources_sha256())
    assert found == []


def test_good_record_has_no_problems() -> None:
    assert gpu_record.problems(record(), SHA256) == []


def test_failure_is_a_problem_even_when_a_run_is_owed() -> None:
    groups = [*record()["groups"][1:], row(GROUPS[0].name, failed=1, failures=["it broke"])]
    for changes in ({}, {"pending": REASON}):
        found = gpu_record.problems(record(groups=groups, **changes), SHA256)
        assert found == [f"{GROUPS[0].name}: 1 failed"]


def test_stale_record_needs_a_reason() -> None:
    assert gpu_record.problems(record(), "b" * 64) == ["cuda_sha256: recorded for other sources"]
    assert gpu_record.problems(record(pending=REASON), "b" * 64) == []
    assert gpu_record.problems({"groups": [], "pending": REASON}, SHA256) == []


@pytest.mark.parametrize("reason", ["", "later", True, None])
def test_reason_must_be_words(reason: object) -> None:
    found = gpu_record.problems(record(pending=reason), "b" * 64)
    assert found == [
        "pending: does not say why in words",
        "cuda_sha256: recorded for other sources",
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"groups": record()["groups"][1:]}, f"groups: {GROUPS[0].name} did not run"),
        ({"groups": [row(group.name, passed=9) for group in GROUPS]}, "cases passed"),
        ({"groups": [{"name": "runner"}]}, "form"),
        ({"groups": [*record()["groups"], row("more", passed=0)]}, "nothing passed"),
        ({"groups": [*record()["groups"], row("more", failed=-1)]}, "form"),
        ({"groups": [*record()["groups"], row("more", failures=["x"])]}, "without a count"),
        ({"device": None}, "device: missing"),
        ({"date": None}, "date: missing"),
    ],
)
def test_incomplete_record_is_a_problem(changes: dict[str, object], problem: str) -> None:
    found = gpu_record.problems(record(**changes), SHA256)
    assert len(found) == 1
    assert problem in found[0]


def test_hash_covers_names_and_contents_but_not_prose(tmp_path: Path) -> None:
    def sha256() -> str:
        return gpu_record.sources_sha256(tmp_path)

    (tmp_path / "decode").mkdir()
    kernel = tmp_path / "decode" / "kernel.cu"
    kernel.write_text("a")
    first = sha256()
    (tmp_path / "README.md").write_text("words")
    assert sha256() == first
    kernel.write_text("b")
    second = sha256()
    kernel.rename(tmp_path / "kernel.cu")
    assert len({first, second, sha256()}) == 3
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "cuda", copy)
    assert gpu_record.sources_sha256(copy) == gpu_record.sources_sha256()


def test_continued_keeps_what_passed_on_the_same_machine_and_sources() -> None:
    new = record(groups=[])
    old = record(groups=[row("runner"), row("api", failed=1, failures=["x"])])
    assert gpu_record.continued(old, new)["groups"] == [row("runner")]
    for key in ("cuda_sha256", "driver"):
        assert gpu_record.continued(old | {key: "other"}, new) == new


def command(code: str) -> tuple[str, ...]:
    return ("{python}", "-c", code)


def test_group_counts_commands_and_survives_a_hang() -> None:
    group = Group(
        "commands",
        2,
        commands=(
            command("print('fine')"),
            command("raise SystemExit('it broke')"),
            command("import time; time.sleep(60)"),
            ("no-such-program",),
        ),
    )
    count = run_group(group, {"python": sys.executable}, {}, rehearse=False)
    assert (count.passed, count.failed) == (1, 3)
    assert "it broke" in count.failures[0]
    assert "hung" in count.failures[1]
    assert "no-such-program" in count.failures[2]
    assert count.seconds < 10


@pytest.fixture
def tests_of_gpu(tmp_path: Path) -> Path:
    """A folder with the conftest of the GPU tests."""
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


def test_group_counts_tests_and_names_the_one_that_ends_the_process(tests_of_gpu: Path) -> None:
    file = tests_of_gpu / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_fine(i): pass\n"
        "def test_broken(): assert 'an error'.isupper()\n"
        "def test_skipped(): pytest.skip('why')\n"
        "def test_dies(): os._exit(70)\n"
        "def test_after(): pass\n"
    )
    count = run_group(Group("some", 120, tests=(str(file),)), {}, ON_CPU, rehearse=True)
    assert (count.passed, count.failed, count.skipped) == (3, 2, 1)
    assert "an error" in count.failures[0]
    assert "pytest ended with 70" in count.failures[1]
    assert "test_dies" in count.failures[1]


def test_command_notes_a_reason_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record()))
    words = [sys.executable, str(ROOT / "tests" / "gpu_record.py"), "--record", str(path)]
    subprocess.run([*words, "--pending", REASON], check=True)
    assert gpu_record.load(path) == record(pending=REASON)


def test_gpu_tests_run_small_on_a_cpu() -> None:
    """A change of the API shows before any GPU time is spent."""
    files = ("tests/gpu/test_gpu_transforms.py", "tests/gpu/test_gpu_api.py")
    count = run_group(Group("rehearsal", 300, tests=files), {}, ON_CPU, rehearse=True)
    assert count.failures == []
    assert count.passed > 10
