"""What the kernel is meant to reach, and whether measured rows reach it."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from judge import TABLE_MATMUL_TFLOPS, Judged

Pair = tuple[float, float]  # must, aim

SMALL_BATCH = 16
TABLED_HEADS, TABLED_QUERIES = (16, 64, 128), (1, 2)
SHARE_COLUMNS = (
    ((128, 8192),),
    ((128, 4096),),
    ((64, 4096), (32, 8192)),
    ((128, 1024), (128, "var4096")),
)
TFLOPS_COLUMNS = (
    ((128, 32768),),
    ((128, 8192),),
    ((128, 4096), (64, 4096)),
    ((32, 8192),),
    ((128, "var4096"),),
    ((128, 1024),),
)
US = {  # by (batch, seqlen), then R
    (1, 4096): {16: (9.5, 7.5), 32: (9.5, 7.5), 64: (11, 8.5), 128: (11, 8.5), 256: (13, 10.5)},
    (1, 65536): {16: (24, 21.5), 32: (24, 21.5), 64: (27, 23), 128: (34, 30), 256: (58, 53)},
}
SHARES = {  # by the R that a line is about
    (16, 32): ((0.93, 0.96), (0.91, 0.95), (0.87, 0.92), (0.84, 0.90)),
    (64,): ((0.90, 0.94), (0.88, 0.92), (0.83, 0.88), (0.78, 0.86)),
}
TFLOPS = {
    (128,): ((675, 700), (650, 680), (645, 670), (620, 650), (610, 640), (560, 600)),
    (256,): ((725, 750), (705, 730), (690, 710), (700, 720), (675, 700), (600, 640)),
}
SPEEDUP, SMALL_SPEEDUP = (1.15, 1.25), (1.4, 1.6)
TRACE_SHARES = {(16, 32, 64): (0.85, 0.90), (128,): (0.78, 0.84)}
BALANCE = 1.05
CLIFF = 1.05
METADATA_US = {"128": (3.0, 2.2), "4096": (5.0, 3.5)}
OVERHEAD_US = (1.3, 1.1)


@dataclasses.dataclass(frozen=True)
class Line:
    """A goal and what was reached.

    Attributes:
        goal: In words.
        reached: The deciding value; None where nothing was measured.
        must: The limit,
        aim: and the better one, None where there is none.
        where: The row that decides.
        higher: Whether more is better.
        form: How numbers are printed.
    """

    goal: str
    reached: float | None
    must: float
    aim: float | None = None
    where: str = ""
    higher: bool = True
    form: str = "{:.2f}"

    @property
    def verdict(self) -> str:
        """aim, must, NO or not measured."""
        if self.reached is None:
            return "not measured"
        if self.aim is not None and self._reaches(self.aim):
            return "aim"
        return "must" if self._reaches(self.must) else "NO"

    def _reaches(self, limit: float) -> bool:
        return self.reached >= limit if self.higher else self.reached <= limit

    def cells(self) -> tuple[str, ...]:
        """Goal, must, aim, reached, verdict."""
        must, aim, reached = (
            "-" if value is None else self.form.format(value)
            for value in (self.must, self.aim, self.reached)
        )
        if self.where and self.reached is not None:
            reached += f" ({self.where})"
        return self.goal, must, aim, reached, self.verdict


def decode_lines(rows: Sequence[Judged]) -> list[Line]:
    """The goals on the 62 rows."""
    lines = [*_speedups(rows), *_latencies(rows)]
    for tiles, limits in SHARES.items():
        lines += _columns(rows, tiles, SHARE_COLUMNS, limits, "share of floor", "{:.1%}")
    for tiles, limits in TFLOPS.items():
        what = f"TFLOP/s at a matmul of {TABLE_MATMUL_TFLOPS:.0f}"
        lines += _columns(rows, tiles, TFLOPS_COLUMNS, limits, what, "{:.0f}")
    return lines


def head_lines(rows: Sequence[Judged]) -> list[Line]:
    """No cliff between the tabled head counts: each row's time over its neighbour's."""
    tabled = {(row.shape[2:], row.rows): row for row in reversed(rows) if _is_tabled(row)}
    over: dict[str, list[tuple[float, str]]] = {"the next tabled R": [], "R = 16": []}
    for row in rows:
        if _is_tabled(row):
            continue
        larger = [of for (where, of) in tabled if where == row.shape[2:] and of >= row.rows]
        if larger:
            other = tabled[row.shape[2:], min(larger)]
            over["the next tabled R"].append((row.us / other.us, row.name))
        if row.rows <= 32 and (other := tabled.get((row.shape[2:], 16))):
            over["R = 16"].append((row.us / other.us, row.name))
    return [
        _worst(f"other head counts: time over that of {of}", found, (CLIFF, None), higher=False)
        for of, found in over.items()
    ]


def trace_lines(shares: Sequence[tuple[int, float, str]], balances: Sequence[Pair]) -> list[Line]:
    """The goals on batches of a trace.

    Args:
        shares: R, share of the floor, and name of each batch.
        balances: Pages of the busiest part over the mean, and name, of each batch.
    """
    lines = [_worst("trace: busiest part over the mean", balances, (BALANCE, None), higher=False)]
    for tiles, limits in TRACE_SHARES.items():
        found = [(share, name) for rows, share, name in shares if rows in tiles]
        label = f"trace, R = {_text(tiles)}: share of floor"
        lines.append(_worst(label, found, limits, form="{:.1%}"))
    return lines


def overhead_lines(result: dict) -> list[Line]:
    """The goals on what surrounds the kernels."""
    over = [(row["overhead_us"], row["row"]) for row in result["rows"] if "overhead_us" in row]
    lines = [_worst("61 layers in one jit: us above the kernels", over, OVERHEAD_US, higher=False)]
    for batch, limits in METADATA_US.items():
        us = result.get("metadata_us", {}).get(batch)
        found = [] if us is None else [(us, "")]
        lines.append(_worst(f"schedule at batch {batch}, us", found, limits, higher=False))
    return lines


def _speedups(rows: Sequence[Judged]) -> list[Line]:
    compared = [row for row in rows if row.ratio is not None]
    slower = [row for row in compared if row.slower]
    worst = max(compared, key=lambda row: row.ratio, default=None)
    where = f"most {worst.ratio:.2f} at {worst.name}" if worst else ""
    count = len(slower) if compared else None
    lines = [
        Line(
            f"rows slower than the best peer, of {len(compared)}",
            count,
            0,
            None,
            where,
            False,
            "{:.0f}",
        )
    ]
    groups: tuple[tuple[str, Callable[[Judged], bool], Pair], ...] = (
        ("all rows", lambda row: True, SPEEDUP),  # noqa: ARG005
        (f"batch <= {SMALL_BATCH}", lambda row: row.batch <= SMALL_BATCH, SMALL_SPEEDUP),
    )
    for name, belongs, (must, aim) in groups:
        ratios = [row.ratio for row in compared if belongs(row)]
        speed = 1 / statistics.geometric_mean(ratios) if ratios else None
        goal = f"speed over the best peer, {name} ({len(ratios)}), geometric mean"
        lines.append(Line(goal, speed, must, aim, form="{:.3f}"))
    return lines


def _latencies(rows: Sequence[Judged]) -> list[Line]:
    lines = []
    for where, limits in US.items():
        for tile, pair in limits.items():
            found = [(row.us, row.name) for row in rows if _at(row, (tile,), (where,))]
            label = f"{where[0]} × {where[1]}, R = {tile}: us"
            lines.append(_worst(label, found, pair, higher=False, form="{:.1f}"))
    return lines


def _columns(
    rows: Sequence[Judged],
    tiles: tuple[int, ...],
    columns: Sequence[tuple[tuple[int, int | str], ...]],
    limits: Sequence[Pair],
    what: str,
    form: str,
) -> list[Line]:
    lines = []
    for places, pair in zip(columns, limits, strict=True):
        found = [
            (row.share if "share" in what else row.table_tflops, row.name)
            for row in rows
            if _at(row, tiles, places)
        ]
        shapes = ", ".join(f"{batch} × {seqlen}" for batch, seqlen in places)
        lines.append(_worst(f"R = {_text(tiles)} at {shapes}: {what}", found, pair, form=form))
    return lines


def _worst(
    goal: str,
    found: Sequence[tuple[float, str]],
    limits: tuple[float, float | None],
    *,
    higher: bool = True,
    form: str = "{:.2f}",
) -> Line:
    """A line that the worst of some values decides."""
    if not found:
        return Line(goal, None, *limits, higher=higher, form=form)
    value, where = (min if higher else max)(found)
    return Line(goal, value, *limits, where if len(found) > 1 else "", higher, form)


def _at(row: Judged, tiles: tuple[int, ...], places: Sequence[tuple[int, int | str]]) -> bool:
    return row.rows in tiles and row.shape[2:] in places


def _is_tabled(row: Judged) -> bool:
    return row.shape[0] in TABLED_HEADS and row.shape[1] in TABLED_QUERIES


def _text(tiles: tuple[int, ...]) -> str:
    return ", ".join(map(str, tiles))
