"""Tables and verdicts from results: `python benchmarks/report.py [FILE ...]`.

Files may be results of decode.py (several runs of the same rows: medians over them), overhead.py,
trace_batches.py and mesh.py; without any, all in results/. ``--plot PNG`` draws the decode rows, or
those of mesh.py where there are only such.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence

import goals
import judge
import mesh_report

RESULTS = pathlib.Path(__file__).parent / "results"
_COLUMNS = (
    "h_q",
    "s_q",
    "batch × length",
    "us",
    "best peer",
    "ratio",
    "TFLOP/s",
    "GB/s",
    "floor",
    "share",
    "under jit",
    "XLA",
)
_GOAL_COLUMNS = ("goal", "must", "aim", "reached", "verdict")


def text(results: Sequence[dict]) -> str:
    """All that results say: runs, rows, verdicts.

    Args:
        results: Of the measuring scripts, each with its ``kind``.
    """
    kinds = {kind: [each for each in results if each.get("kind") == kind] for kind in _KINDS}
    parts = [describe(kinds[kind], kind) for kind in kinds if kinds[kind]]
    return "\n\n".join(parts) or f"no results of a kind that is reported: {', '.join(_KINDS)}"


def describe(results: Sequence[dict], kind: str) -> str:
    """The results of one kind."""
    about = [_about(result) for result in results]
    tables, lines = _KINDS[kind](results)
    return "\n\n".join(["\n".join(about), *tables, _markdown(_GOAL_COLUMNS, _cells(lines))])


def table(rows: Sequence[judge.Judged]) -> str:
    """The rows of `decode.py`."""
    return _markdown(_COLUMNS, [_row(row) for row in rows])


def _decode(results: Sequence[dict]) -> tuple[list[str], list[goals.Line]]:
    rows = judge.judge(list(results))
    return [table(rows), *_card_lines(results)], goals.decode_lines(rows)


def _heads(results: Sequence[dict]) -> tuple[list[str], list[goals.Line]]:
    rows = judge.judge(list(results))
    return [table(rows), *_card_lines(results)], goals.head_lines(rows)


def _overhead(results: Sequence[dict]) -> tuple[list[str], list[goals.Line]]:
    return [], goals.overhead_lines(_medians(results))


def _trace(results: Sequence[dict]) -> tuple[list[str], list[goals.Line]]:
    shares, balances, tables = [], [], []
    for result in results:
        cells = []
        for batch in result["batches"]:
            name = f"{batch['time_s']:.0f} s, {batch['tpot_ms']:g} ms per token, h{batch['h_q']}"
            us = batch["kernels_us"] or batch["us"]
            share = judge.floor_us(batch, result["ceilings"]) / us
            shares.append((batch["h_q"], share, name))
            balances.append((batch["busiest"], name))
            cells.append(_trace_cells(batch, share))
        tables.append(_markdown(_TRACE_COLUMNS, cells))
    return tables, goals.trace_lines(shares, balances)


def _mesh(results: Sequence[dict]) -> tuple[list[str], list[goals.Line]]:
    tables = [_markdown(*table) for result in results for table in mesh_report.tables(result)]
    return tables, [line for result in results for line in mesh_report.lines(result)]


_TRACE_COLUMNS = (
    *("tpot", "h_q", "time s", "requests", "tokens"),
    *("layer us", "kernels us", "share", "busiest", "error"),
)
_KINDS = {
    "decode": _decode,
    "heads": _heads,
    "overhead": _overhead,
    "trace": _trace,
    "mesh": _mesh,
}


def _medians(results: Sequence[dict]) -> dict:
    """One overhead result of several: the median of each number."""
    merged: dict = {"rows": [], "metadata_us": {}}
    for row in results[0]["rows"]:
        same = [each for r in results for each in r["rows"] if each["row"] == row["row"]]
        over = [each["overhead_us"] for each in same if "overhead_us" in each]
        if over:
            merged["rows"].append({"row": row["row"], "overhead_us": statistics.median(over)})
    for batch in results[0].get("metadata_us", {}):
        values = [r["metadata_us"][batch] for r in results if batch in r.get("metadata_us", {})]
        merged["metadata_us"][batch] = statistics.median(values)
    return merged


def _about(result: dict) -> str:
    env = result["env"]
    words = [f"{env['device']}, {env['date']}, commit {env['commit']}: {env['command']}"]
    if limits := result.get("ceilings"):
        words.append("ceilings: " + ", ".join(f"{name} {v:.0f}" for name, v in limits.items()))
    if "left_out" in result:
        scale, each = judge.factor(result), judge.factors(result)
        words.append(
            f"peers that did not run: their table times × {scale:.3f}, FA3 now over FA3 there"
            f" (rows from {min(each):.2f} to {max(each):.2f})"
            if scale
            else "peers that did not run: their table times as they are, FA3 did not run either"
        )
        words += [f"left out: {name}, {why}" for name, why in result["left_out"].items()]
    words += result.get("remarks", [])
    return "\n".join(f"- {word}" for word in words)


def _card_lines(results: Sequence[dict]) -> list[str]:
    """The range of the card's clock and power over the rows."""
    states = [row["card"] for result in results for row in result["rows"] if row["card"]]
    if not states:
        return []
    clocks, watts = ([state[name] for state in states] for name in ("sm_mhz", "watts"))
    return [
        f"card, row by row: SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz, median"
        f" {statistics.median(clocks):.0f}; power {min(watts):.0f} to {max(watts):.0f} W"
    ]


def _row(row: judge.Judged) -> tuple[str, ...]:
    h_q, s_q, batch, seqlen = row.shape
    return (
        str(h_q),
        str(s_q),
        f"{batch} × {seqlen}",
        f"{row.us:.1f}",
        f"{row.best_us:.1f} ({row.best_peer})" if row.best_peer else "-",
        f"{row.ratio:.2f}{' slower' if row.slower else ''}" if row.ratio else "-",
        f"{row.tflops:.0f}",
        f"{row.gbps:.0f}",
        f"{row.floor_us:.1f}",
        f"{row.share:.0%}",
        f"{row.jit_us:.1f}" if row.jit_us else "-",
        f"{row.xla_us:.0f}" if row.xla_us else "-",
    )


def _trace_cells(batch: dict, share: float) -> tuple[str, ...]:
    return (
        f"{batch['tpot_ms']:g}",
        str(batch["h_q"]),
        f"{batch['time_s']:.0f}",
        str(batch["requests"]),
        f"{batch['tokens']:,}",
        f"{batch['us']:.1f}",
        f"{batch['kernels_us']:.1f}" if batch["kernels_us"] else "-",
        f"{share:.1%}",
        f"{batch['busiest']:.3f}",
        f"{batch['error']:.2f}",
    )


def _cells(lines: Iterable[goals.Line]) -> list[tuple[str, ...]]:
    return [line.cells() for line in lines]


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: all in results/")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draw the decode rows")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    print(text(results))
    if options.plot:
        import plot

        decode = [each for each in results if each.get("kind") == "decode"]
        if decode:
            plot.draw(decode, options.plot)
        else:
            mesh_report.draw(next(x for x in results if x.get("kind") == "mesh"), options.plot)


if __name__ == "__main__":
    main()
