"""What results of `mesh.py` mean: tables, whether goals are reached, and a plot."""

import pathlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import goals

from jax_flashmla._exchange import EXCHANGES

_COLORS = ("tab:green", "limegreen", "tab:orange", "gold", "tab:red", "tab:pink")
WEAK_MOST, HEADS_MOST = 1.03, 1.03
# By row and GPUs: how many times as fast as one GPU.
CONTEXT_LEAST = {
    ("context/8x131072/h128/s1", 2): 1.8,
    ("context/8x131072/h128/s1", 4): 3.3,
    ("context/1x524288/h128/s1", 2): 1.7,
    ("context/1x524288/h128/s1", 4): 2.7,
}
SPREAD_COLUMNS = ("spread", "heads", "batch × tokens", "GPUs", "us", "one GPU alone, us", "ratio")
CONTEXT_COLUMNS = (
    *("heads", "batch × tokens", "GPUs", "exchange", "us", "speed-up"),
    *("captured, us", "speed-up", "in a scan, us", "exchange alone, us", "captured, us"),
)
WHOLE = tuple(f"{x}{how}" for x in EXCHANGES for how in ("", ", captured"))
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def tables(result: dict) -> list[Table]:
    """Columns and rows of all tables."""
    made = [_equality(result["equality"])] if result["equality"] else []
    spread = [line for row in result["rows"] if row["way"] != "context" for line in _spread(row)]
    context = [line for row in result["rows"] if row["way"] == "context" for line in _context(row)]
    made += [(SPREAD_COLUMNS, spread)] if spread else []
    return made + ([(CONTEXT_COLUMNS, context)] if context else [])


def lines(result: dict) -> list[goals.Line]:
    """What is to be reached."""
    found = []
    entries = result["equality"]
    if entries:
        wrong = sum(entry["total"] - entry["passed"] for entry in entries)
        total = sum(entry["total"] for entry in entries)
        goal = f"results over meshes other than one GPU's, of {total}"
        found.append(goals.Line(goal, wrong, 0, higher=False))
    for row in result["rows"]:
        us = _medians(row)
        for n in _counts(row):
            where = f"{row['row']} on {n}"
            if row["way"] == "context":
                least = CONTEXT_LEAST.get((row["row"], n))
                if least:
                    name = min(_whole(us, n), key=lambda x: us[f"{x} on {n}"])
                    gain = _alone(us) / us[f"{name} on {n}"]
                    found.append(goals.Line(f"{where}: speed-up", gain, least, where=name))
            else:
                most = WEAK_MOST if row["way"] == "requests" else HEADS_MOST
                ratio = us[f"on {n}"] / _reference(row, us, n)
                found.append(goals.Line(f"{where}: over one GPU", ratio, most, higher=False))
    return found


def draw(result: dict, path: pathlib.Path) -> None:
    """Draws speed-up over GPUs, and what a call of context parallelism is made of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _draw_speed(left, result)
    _draw_parts(right, [row for row in result["rows"] if row["way"] == "context"])
    figure.suptitle(f"MLA decode over several {result['env']['device']} of one host")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_speed(axes: object, result: dict) -> None:
    most = max(result["devices"])
    axes.plot([1, most], [1, most], color="black", linewidth=0.8, label="ideal")
    markers = {"requests": "o", "heads": "s", "context": "^"}
    for row in result["rows"]:
        us, counts = _medians(row), _counts(row)
        work = {n: n if row["way"] == "requests" else 1 for n in counts}
        times = {n: us.get(f"on {n}", us.get(f"direct on {n}")) for n in counts}
        gain = [1.0, *(work[n] * _alone(us) / times[n] for n in counts)]
        axes.plot([1, *counts], gain, marker=markers[row["way"]], label=row["row"])
    axes.set(xlabel="GPUs", ylabel="tokens per second, over one GPU's", xticks=result["devices"])
    axes.legend(fontsize="small")
    axes.grid(visible=True, alpha=0.2)


def _draw_parts(axes: object, rows: Sequence[dict]) -> None:
    """Bars: one GPU; attention alone, and what exchange and merge add, of each way to exchange."""
    bars: list[tuple[str, float, float, str]] = []  # name, attention, what is added, color
    for row in rows:
        us = _medians(row)
        bars.append(
            (f"{row['batch']}x{row['seqlen']}/h{row['h_q']}: 1 GPU", _alone(us), 0, "white")
        )
        for n in _counts(row):
            attention = us[f"attention on {n}"]
            for name in _whole(us, n):
                added = max(0.0, us[f"{name} on {n}"] - attention)
                bars.append((f"{n} GPUs", attention, added, _COLORS[WHOLE.index(name)]))
    places = range(len(bars))
    attentions = [bar[1] for bar in bars]
    axes.bar(places, attentions, color="tab:blue", label="attention alone")
    for name, color in zip(WHOLE, _COLORS, strict=True):
        some = [i for i in places if bars[i][3] == color]
        axes.bar(
            some,
            [bars[i][2] for i in some],
            bottom=[attentions[i] for i in some],
            color=color,
            label=f"exchange and merge: {name}",
        )
    axes.set_xticks(list(places), [bar[0] for bar in bars], rotation=90, fontsize=6)
    axes.set(ylabel="us per call", title="Context parallelism")
    axes.legend(fontsize="small")


def _equality(entries: Sequence[dict]) -> Table:
    """Passed of all, by op, with the kinds of mesh together."""
    kinds: dict[str, list[str]] = defaultdict(list)
    found: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for entry in entries:
        if entry["kind"] not in kinds[entry["what"]]:
            kinds[entry["what"]].append(entry["kind"])
        cell = found[entry["what"]].setdefault(entry["devices"], [0, 0])
        cell[0] += entry["passed"]
        cell[1] += entry["total"]
    columns = sorted({entry["devices"] for entry in entries})
    rows = [
        (what, _kinds(kinds[what]), *(_passed(cells.get(n)) for n in columns))
        for what, cells in found.items()
    ]
    return ("op", "mesh", *(f"{n} GPU{'s' * (n > 1)}" for n in columns)), rows


def _kinds(names: Sequence[str]) -> str:
    """The kinds of mesh; ways to use shard_map are counted."""
    mapped = sum(name.startswith("shard_map") for name in names)
    ways = [f"shard_map in {mapped} ways"] if mapped > 1 else []
    return ", ".join([x for x in names if not ways or not x.startswith("shard_map")] + ways)


def _passed(cell: list[int] | None) -> str:
    return f"{cell[0]}/{cell[1]}" if cell else "-"


def _spread(row: dict) -> Iterator[tuple[str, ...]]:
    us = _medians(row)
    for n in _counts(row):
        one, whole = _reference(row, us, n), us[f"on {n}"]
        heads = f"{row['h_q'] // n} of {row['h_q']}" if row["way"] == "heads" else str(row["h_q"])
        shape = f"{row['batch']} × {row['seqlen']}"
        each = f"{shape} each" if row["way"] == "requests" else shape
        yield row["way"], heads, each, str(n), f"{whole:.1f}", f"{one:.1f}", f"{whole / one:.3f}"


def _context(row: dict) -> Iterator[tuple[str, ...]]:
    us = _medians(row)
    shape, nothing = (str(row["h_q"]), f"{row['batch']} × {row['seqlen']}"), ["-"] * 5

    def time_and_gain(name: str) -> list[str]:
        return [f"{us[name]:.1f}", f"{_alone(us) / us[name]:.2f}"]

    yield (*shape, "1", "-", f"{_alone(us):.1f}", "1.00", *nothing)
    for n in _counts(row):
        yield (
            *shape,
            str(n),
            "none: attention alone",
            *time_and_gain(f"attention on {n}"),
            *nothing,
        )
        for exchange in (x for x in EXCHANGES if x in _whole(us, n)):
            cells = time_and_gain(f"{exchange} on {n}")
            cells += time_and_gain(f"{exchange}, captured on {n}")
            names = f"{exchange}, in a scan", f"merge, {exchange}", f"merge, {exchange}, captured"
            found = [us.get(f"{name} on {n}") for name in names]
            cells += [f"{x:.1f}" if x else "-" for x in found]
            yield (*shape, str(n), exchange, *cells)


def _whole(us: dict[str, float], n: int) -> list[str]:
    """The ways to exchange that were measured: results of before 2026-11-29 lack one."""
    return [x for x in WHOLE if f"{x} on {n}" in us]


def _reference(row: dict, us: dict[str, float], n: int) -> float:
    """One GPU that does alone what each of n does."""
    if row["way"] == "requests":
        return _alone(us)
    return us[f"{row['h_q'] // n} heads alone, GPU 0"]


def _alone(us: dict[str, float]) -> float:
    """The mean over the GPUs of the host."""
    return statistics.mean(value for name, value in us.items() if name.startswith("alone"))


def _medians(row: dict) -> dict[str, float]:
    return {name: program["us"] for name, program in row["programs"].items()}


def _counts(row: dict) -> list[int]:
    """Numbers of GPUs above one."""
    found = (re.search(r"(?:^| )on (\d+)$", name) for name in row["programs"])
    return sorted({int(match[1]) for match in found if match})
