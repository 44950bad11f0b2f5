"""The decode rows under the roofline, and beside their best peers, as a PNG (needs matplotlib)."""

import pathlib
from collections.abc import Sequence

import judge

_COLORS = {16: "tab:blue", 32: "tab:cyan", 64: "tab:green", 128: "tab:orange", 256: "tab:red"}
_ROOF_FROM, _ROOF_TO = 10.0, 1000.0  # FLOP per byte


def draw(results: Sequence[dict], path: pathlib.Path) -> None:
    """Draws the medians over these results of `decode.py` into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = judge.judge(list(results))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    _roofline(left, rows, results[0]["ceilings"])
    _beside_peers(right, rows)
    figure.suptitle(f"MLA decode on {results[0]['env']['device']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _roofline(axes: object, rows: Sequence[judge.Judged], limits: dict[str, float]) -> None:
    """TFLOP/s over FLOP per byte; dot size by batch."""
    bandwidth, peak = judge.rates(limits)
    ridge = peak / bandwidth
    axes.loglog(
        [_ROOF_FROM, ridge, _ROOF_TO],
        [_ROOF_FROM * bandwidth / 1e12, peak / 1e12, peak / 1e12],
        color="black",
        label=f"{bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s: what floors are of",
    )
    for tile in sorted({row.rows for row in rows}):
        some = [row for row in rows if row.rows == tile]
        axes.scatter(
            [1e3 * row.tflops / row.gbps for row in some],
            [row.tflops for row in some],
            s=[12 + row.batch for row in some],
            color=_COLORS.get(tile, "tab:gray"),
            alpha=0.6,
            label=f"R = {tile}",
        )
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title="Under the roofline (dot: batch)")
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(visible=True, which="both", alpha=0.2)


def _beside_peers(axes: object, rows: Sequence[judge.Judged]) -> None:
    """Time over the best peer's, and over the floor, row by row."""
    compared = [row for row in rows if row.ratio is not None]
    places = range(len(compared))
    axes.bar(
        places,
        [row.ratio for row in compared],
        color=[_COLORS.get(row.rows, "tab:gray") for row in compared],
    )
    axes.axhline(1.0, color="black", linewidth=0.8)
    names = [row.name for row in compared]
    axes.set_xticks(list(places), names, rotation=90, fontsize=5)
    axes.set(ylabel="time over the best peer's", title="Beside the best peer (lower is faster)")
