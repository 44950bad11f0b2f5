"""A second process finds what a first one compiled in JAX's persistent compilation cache."""

import json
import subprocess
import sys
from pathlib import Path

import cached_programs
import child_process
import pytest

SECONDS = 180


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What two processes, one after the other, say of each program."""
    folder = tmp_path_factory.mktemp("cache")
    return run(folder, "first.json"), run(folder, "second.json")


def run(folder: Path, name: str) -> dict:
    script = Path(cached_programs.__file__)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder / "entries"), str(folder / name)],
        env=child_process.environment(cpu_devices=cached_programs.DEVICES),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("name", cached_programs.PROGRAMS)
def test_a_second_process_compiles_nothing(found: tuple[dict, dict], name: str) -> None:
    first, second = (x[name] for x in found)
    assert (first["hits"], first["misses"]) == (0, 1)
    assert (second["hits"], second["misses"]) == (1, 0)


@pytest.mark.parametrize("name", cached_programs.PROGRAMS)
def test_two_processes_lower_the_same_for_cuda(found: tuple[dict, dict], name: str) -> None:
    first, second = (x[name]["cuda"] for x in found)
    assert first == second
