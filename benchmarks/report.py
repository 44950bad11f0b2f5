"""The results as a Markdown table and a few summary lines: `python benchmarks/report.py`."""

import json
import math
import pathlib
import sys
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-decode.json"
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
    "XLA",
)


def table(result: dict) -> str:
    """Rows, then geometric means over the groups that goals are set for."""
    rows = [row for row in result["rows"] if row["us"] is not None]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += [_line(row) for row in rows]
    if len(rows) < len(result["rows"]):
        lines.append(f"\n{len(result['rows']) - len(rows)} rows were not measured")
    compared = [row for row in rows if row["best_peer_us"]]
    for name, group, limit in (
        ("batch >= 32", [row for row in compared if row["batch"] >= 32], 1.3),
        ("batch <= 16", [row for row in compared if row["batch"] <= 16], 1.7),
        ("all", compared, 1.7),
    ):
        if group:
            ratios = [row["ratio_to_best"] for row in group]
            over = sum(ratio > limit for ratio in ratios)
            lines.append(
                f"\n{name}: {len(group)} rows, time over best peer {_geometric(ratios):.2f}"
                f" (most {max(ratios):.2f}, {over} above {limit}),"
                f" over the floor {_geometric(1 / row['share'] for row in group):.2f}"
            )
    return "\n".join(lines)


def _line(row: dict) -> str:
    peer = f"{row['best_peer_us']} ({row['best_peer']})" if row["best_peer_us"] else "-"
    cells = [
        row["h_q"],
        row["s_q"],
        f"{row['batch']} × {row['seqlen']}",
        f"{row['us']:.1f}",
        peer,
        f"{row['ratio_to_best']:.2f}" if row["best_peer_us"] else "-",
        f"{row['tflops']:.0f}",
        f"{row['gbps']:.0f}",
        f"{row['floor_us']:.1f}",
        f"{row['share']:.0%}",
        f"{row['xla_us']:.0f}" if row["xla_us"] else "-",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(table(json.loads(path.read_text(encoding="utf-8"))))
