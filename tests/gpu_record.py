"""All GPU checks in one command; what they found becomes tests/gpu_record.json.

    python tests/gpu_record.py                     run everything, write the record
    python tests/gpu_record.py --missing           run what the record lacks for these sources
    python tests/gpu_record.py --only grid-heads   run some groups, write nothing
    python tests/gpu_record.py --pending "why"     note in the record why a run is owed

The record is never edited by hand. It is written after every group, so that it holds what was
found so far whatever happens next; a record that lacks groups does not pass `problems`.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from gpu_groups import GROUPS, ROOT, Group
from gpu_run import Count, run_group

Record = dict[str, Any]

RECORD = ROOT / "tests" / "gpu_record.json"
MIN_GRID_CASES = 2000
MIN_REASON_WORDS = 4
ENVIRONMENT = ("device", "driver", "cuda", "jax", "jaxlib", "python")
ABOUT = """
import json, platform, subprocess, jax, jaxlib, jax_flashmla
query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
try:
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
except (OSError, IndexError):
    driver = "none"
status = jax_flashmla.status()
about = [status.device, driver, status.cuda or "none", jax.__version__, jaxlib.__version__]
print(json.dumps([*about, platform.python_version()]))
"""


def sources_sha256(folder: Path = ROOT / "cuda") -> str:
    """Over all files of a folder, their relative paths and contents; prose (*.md) excepted."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and path.suffix != ".md":
            content = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def problems(record: Record, sha256: str) -> list[str]:
    """What keeps a record from standing for these sources; empty when it does.

    Args:
        record: the parsed file.
        sha256: of the sources as they are now.
    """
    words = record.get("pending", "")
    pending = isinstance(words, str) and len(words.split()) >= MIN_REASON_WORDS
    found = [] if pending or "pending" not in record else ["pending: does not say why in words"]
    rows = record.get("groups", [])
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        return [*found, "groups: not rows of the expected form"]
    found += [f"{row['name']}: {row['failed']} failed" for row in rows if row["failed"]]
    found += [f"{row['name']}: failures without a count" for row in rows
              if row["failures"] and not row["failed"]]  # fmt: skip
    found += [f"{row['name']}: nothing passed" for row in rows if not row["passed"]]
    owed = []
    if record.get("cuda_sha256") != sha256:
        owed.append("cuda_sha256: recorded for other sources")
    missing = [group.name for group in GROUPS if group.name not in {row["name"] for row in rows}]
    if missing:
        owed.append(f"groups: {', '.join(missing)} did not run")
    grid = sum(row["passed"] for row in rows if row["name"].startswith("grid-"))
    if not missing and grid < MIN_GRID_CASES:
        owed.append(f"grid: {grid} cases passed, expected {MIN_GRID_CASES}")
    unsaid = [key for key in (*ENVIRONMENT, "date") if not isinstance(record.get(key), str)]
    owed += [f"{key}: missing" for key in unsaid]
    return found if pending else found + owed


def _is_row(row: object) -> bool:
    types = {field.name: field.type for field in dataclasses.fields(Count)}
    return (
        isinstance(row, dict)
        and row.keys() == types.keys()
        and isinstance(row["name"], str)
        and all(type(row[key]) is int and row[key] >= 0 for key in ("passed", "failed", "skipped"))
        and isinstance(row["failures"], list)
    )


def load(path: Path) -> Record:
    """The record in a file, {} without one."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, record: Record) -> None:
    """Writes the record in one step, so that no reader sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def new_record() -> Record:
    """A record without groups, for these sources and this machine."""
    told = subprocess.run(
        [sys.executable, "-P", "-c", ABOUT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    about = json.loads(told.stdout) if told.returncode == 0 else ["unknown"] * len(ENVIRONMENT)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = dict(zip(ENVIRONMENT, about, strict=True))
    return {"cuda_sha256": sources_sha256(), **environment, "date": now, "groups": []}


def continued(old: Record, new: Record) -> Record:
    """The new record with what the old one found for the same sources on the same machine."""
    if any(old.get(key) != new[key] for key in ("cuda_sha256", *ENVIRONMENT)):
        return new
    return {**new, "groups": [row for row in old["groups"] if not row["failed"]]}


def run_all(groups: list[Group], options: argparse.Namespace, record: Record | None) -> list[Count]:
    """Runs groups, several at once; keeps the record up to date when there is one."""
    tools = {
        "runner": str(options.runner),
        "checked_runner": str(options.checked_runner),
        "probes": str(options.probes),
        "python": sys.executable,
    }
    counts: list[Count] = []
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as cache:
        environment = _environment(options.jobs, cache)

        def one(group: Group) -> None:
            count = run_group(group, tools, environment, rehearse=options.rehearse)
            with lock:
                counts.append(count)
                print(_row(count), flush=True)
                if record is not None:
                    record["groups"] = [
                        *(row for row in record["groups"] if row["name"] != group.name),
                        dataclasses.asdict(count),
                    ]
                    save(options.record, record)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, groups))
    return counts


def _environment(jobs: int, cache: str) -> dict[str, str]:
    """The GPU's memory is divided; the oracle's programs are compiled once, without tuning."""
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.8 / (jobs + 1):.2f}",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }


def _row(count: Count) -> str:
    numbers = f"{count.passed:6d} {count.failed:6d} {count.skipped:7d} {count.seconds:8.1f}"
    return f"{count.name:18s} {numbers}"


def _report(counts: list[Count]) -> None:
    """Every failure in words, then the table."""
    for count in counts:
        for words in count.failures:
            print(f"--- {count.name}: {words}")
    print(f"\n{'group':18s} passed failed skipped  seconds")
    for count in counts:
        print(_row(count))
    total = Count("all", *(sum(getattr(c, key) for c in counts)
                           for key in ("passed", "failed", "skipped")))  # fmt: skip
    total.seconds = max((count.seconds for count in counts), default=0.0)
    print(_row(total))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [group.name for group in GROUPS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="GROUP", help=", ".join(names))
    parser.add_argument("--missing", action="store_true", help="continue the record")
    parser.add_argument("--pending", metavar="WHY", help="say in the record why a run is owed")
    parser.add_argument("--rehearse", action="store_true", help="tests alone, small, on a CPU")
    parser.add_argument("--jobs", type=int, default=3, help="groups at once (default 3)")
    parser.add_argument("--record", type=Path, default=RECORD)
    build = ROOT / "build"
    parser.add_argument("--runner", type=Path, default=build / "runner" / "flashmla_runner")
    parser.add_argument(
        "--checked-runner", type=Path, default=build / "runner-debug" / "flashmla_runner"
    )
    parser.add_argument("--probes", type=Path, default=build / "runner" / "flashmla_probes")
    return parser.parse_args()


def main() -> int:
    options = _parse()
    if options.pending is not None:
        record = {"groups": []} | load(options.record) | {"pending": options.pending}
        save(options.record, record)
        return 0
    groups = [group for group in GROUPS if not options.only or group.name in options.only]
    record = None
    if options.rehearse:
        groups = [group for group in groups if group.tests]
    elif not options.only:
        record = new_record()
        record = continued(load(options.record), record) if options.missing else record
        done = {row["name"] for row in record["groups"]}
        groups = [group for group in groups if group.name not in done]
    counts = run_all(groups, options, record)
    _report(counts)
    found = [f"{c.name} failed" for c in counts if c.failed]
    if record is not None:
        found = problems(record, sources_sha256())
    print("\n".join(found) or "passed")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
