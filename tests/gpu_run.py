"""Runs one group of GPU checks in processes with time limits and counts what passed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_groups import ROOT, Group

TAIL = 1500  # characters of output kept for a failure
MOST_FAILURES = 25  # that a group records in words; the count is complete


@dataclasses.dataclass
class Count:
    """A row of the record, while and after its group runs."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    def fail(self, words: str) -> None:
        """Counts one failure and says what it was."""
        self.failed += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(words)


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a process ended; `status` is None when the limit ended it."""

    status: int | None
    output: str


def run_group(
    group: Group, tools: Mapping[str, str], environment: Mapping[str, str], *, rehearse: bool
) -> Count:
    """Runs a group to its end or its limit.

    Args:
        group: what to run.
        tools: what {runner}, {checked_runner} and {python} stand for.
        environment: for the processes, on top of this one's.
        rehearse: run the tests small and portable, on a CPU.
    """
    start = time.monotonic()
    count = Count(group.name)
    environment = {**os.environ, **environment, **dict(group.environment)}
    if group.tests:
        _run_pytest(group, environment, count, rehearse=rehearse)
    for words in group.commands:
        _run_command([word.format(**tools) for word in words], group.seconds, environment, count)
    count.seconds = round(time.monotonic() - start, 1)
    return count


def _run_pytest(
    group: Group, environment: Mapping[str, str], count: Count, *, rehearse: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        words = [sys.executable, "-P", "-m", "pytest", *group.tests, "-q", "--tb=short"]
        words += ["-p", "no:cacheprovider", "--maxfail", str(MOST_FAILURES)]
        words += ["--gpu-results", str(results), "--rehearse" if rehearse else "--require-gpu"]
        finished = run(words, group.seconds, environment)
        last = _count_results(results.read_text().splitlines(), count)
    if finished.status is None:
        count.fail(f"hung: no end after {group.seconds} s, last in {last}")
    elif finished.status not in (0, 1):
        count.fail(f"pytest ended with {finished.status}, last in {last}: {finished.output}")
    elif not (count.passed or count.failed or count.skipped):
        count.fail(f"no test ran: {finished.output}")


def _count_results(lines: list[str], count: Count) -> str:
    """Adds the results file of tests/gpu/conftest.py; returns the test that began last."""
    last = "no test"
    for line in map(json.loads, lines):
        if "begins" in line:
            last = line["begins"]
        elif line["outcome"] == "failed":
            count.fail(f"{line['test']}: {line['error']}")
        elif line["outcome"] == "skipped":
            count.skipped += 1
        else:
            count.passed += 1
    return last


def _run_command(
    words: list[str], seconds: int, environment: Mapping[str, str], count: Count
) -> None:
    finished = run(words, seconds, environment)
    line = " ".join(words)
    if finished.status == 0:
        count.passed += 1
    elif finished.status is None:
        count.fail(f"{line}: hung, no end after {seconds} s: {finished.output}")
    else:
        count.fail(f"{line}: status {finished.status}: {finished.output}")


def run(words: list[str], seconds: float, environment: Mapping[str, str]) -> Finished:
    """One process from the repository's root; its whole process group is killed at the limit."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Finished(-1, str(error))
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        output.seek(0)
        return Finished(status, output.read()[-TAIL:])
