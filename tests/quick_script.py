"""Runs a benchmark script on the tiny shapes of its `--quick`, in a process of its own."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import child_process

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def run_quick(script: str, out: pathlib.Path, *arguments: str) -> dict[str, Any]:
    """Returns the result that the script wrote to `out`, after checks that hold for all scripts."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *arguments]
    done = subprocess.run(
        [*command, "--out", str(out)],
        env=child_process.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "the numbers mean nothing" in done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"device", "jax", "commit", "command"} <= set(result["env"])
    return result
