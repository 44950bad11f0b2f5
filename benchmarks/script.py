"""What the measuring scripts share: their options, the rows to run, progress, the result's file."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
from workload import Row, load_rows

Item = TypeVar("Item")


def parser(description: str, *, rows: str, results: pathlib.Path) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        description: First line of the help.
        rows: Patterns of the rows that run without ``--rows``.
        results: File that a full run writes without ``--out``.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--rows", default=rows, help="comma-separated patterns on names such as 128x4096/h16/s1"
    )
    made.add_argument("--out", type=pathlib.Path, help=f"JSON file (default {results.name})")
    made.add_argument("--commit", help="of the sources, where they are in no git checkout")
    made.add_argument("--quick", action="store_true", help="tiny shapes, checks the script")
    return made


def choose_rows(
    options: argparse.Namespace, load: Callable[[str], list[Row]] = load_rows
) -> list[Row]:
    """The rows asked for, tiny ones for ``--quick``; ends the script where they cannot run.

    Args:
        options: Of `parser`.
        load: Maps the patterns of ``--rows`` to rows.
    """
    rows = load(options.rows)
    platform = jax.default_backend()
    if not rows:
        raise SystemExit(f"error: no row matches {options.rows!r}; a row: 128x4096/h16/s1")
    if options.quick:
        say(f"--quick on {platform}: tiny shapes, the numbers mean nothing")
        return list(dict.fromkeys(row.shrunk() for row in rows))
    if platform != "gpu":
        raise SystemExit(f"error: JAX runs on {platform}, the rows need a GPU (or --quick)")
    return rows


def write(result: dict[str, object], options: argparse.Namespace, results: pathlib.Path) -> None:
    """Writes a result to ``--out``, or else to ``results``; a quick one only where asked to."""
    out = options.out or (None if options.quick else results)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def progress(items: Iterable[Item], count: int, what: str) -> Iterator[Item]:
    """Yields the items behind a progress bar, or a line every few items without tqdm."""
    try:
        import tqdm
    except ImportError:
        for number, item in enumerate(items, start=1):
            if number % 10 == 1:
                say(f"[{number}/{count}] {what}")
            yield item
    else:
        yield from tqdm.tqdm(items, total=count, desc=what, file=sys.stderr, mininterval=1)
