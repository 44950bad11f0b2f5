"""What measured rows mean: best peer, floor and ratio of each, over one or several runs."""

import dataclasses
import json
import pathlib
import statistics

PEERS = pathlib.Path(__file__).parent / "peers-h200.json"
# The table's ceilings; a run's floors are scaled by what its own card reached of 4.6 and 787.
TABLE_BYTES_PER_S, TABLE_READ_GBPS, TABLE_MATMUL_TFLOPS = 4.65e12, 4600.0, 787.0
# Of another day than the rest of the table: it counts only where it was measured beside ours.
OTHER_RUN = "vllm_flashmla"
REFERENCE = "fa3"  # what ties a run to the table
TIE, COMPUTE_BOUND_TIE = 0.02, 0.05

Shape = tuple[int, int, int, int | str]  # h_q, s_q, batch, seqlen


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row, as the median over runs.

    Attributes:
        shape: h_q, s_q, batch, seqlen.
        us: Ours.
        floor_us: The least time this run's card allows.
        share: ``floor_us / us``.
        tflops: Ours.
        table_tflops: The same for a card of the table's matmul rate.
        gbps: Ours.
        compute_bound: Whether the floor is one of FLOP.
        best_peer: The fastest peer; None where the table has no such row and none was measured.
        best_us: Its time: measured beside ours, or the table's times the run's factor.
        ratio: ``us / best_us``.
        xla_us: Gather + einsum.
        jit_us: Ours, in a chain under jit.
    """

    shape: Shape
    us: float
    floor_us: float
    share: float
    tflops: float
    table_tflops: float
    gbps: float
    compute_bound: bool
    best_peer: str | None
    best_us: float | None
    ratio: float | None
    xla_us: float | None
    jit_us: float | None

    @property
    def rows(self) -> int:
        """Packed query rows per request, R = s_q · h_q."""
        return self.shape[0] * self.shape[1]

    @property
    def batch(self) -> int:
        """Requests."""
        return self.shape[2]

    @property
    def name(self) -> str:
        """Such as 128x4096/h16/s1."""
        h_q, s_q, batch, seqlen = self.shape
        return f"{batch}x{seqlen}/h{h_q}/s{s_q}"

    @property
    def slower(self) -> bool:
        """Whether the best peer is faster by more than a tie."""
        tie = COMPUTE_BOUND_TIE if self.compute_bound else TIE
        return self.ratio is not None and self.ratio > 1 + tie


def judge(results: list[dict]) -> list[Judged]:
    """The rows of these results of `decode.py`, each the median over the results that hold it."""
    runs = [{judged.shape: judged for judged in _run(result)} for result in results]
    shapes = dict.fromkeys(shape for run in runs for shape in run)
    return [_median([run[shape] for run in runs if shape in run]) for shape in shapes]


def factor(result: dict) -> float | None:
    """FA3 in this run over FA3 in the table, the geometric mean over all rows; None without FA3."""
    ratios = factors(result)
    return statistics.geometric_mean(ratios) if ratios else None


def factors(result: dict) -> list[float]:
    """FA3 in this run over FA3 in the table, of each row that has both."""
    table = _table()
    return [
        row["peers_us"][REFERENCE] / table[_shape(row)][REFERENCE]
        for row in result["rows"]
        if REFERENCE in row["peers_us"] and _shape(row) in table
    ]


def rates(limits: dict[str, float]) -> tuple[float, float]:
    """Bytes and FLOP per second that a run's floors are counted with.

    The table's own ceilings, scaled by what the run's card reached of its read and matmul.
    """
    bytes_per_s = TABLE_BYTES_PER_S * limits["read_gbps"] / TABLE_READ_GBPS
    return bytes_per_s, limits["matmul_tflops"] * 1e12


def floor_us(work: dict, limits: dict[str, float]) -> float:
    """The least time of ``bytes`` and ``flop`` under a run's ceilings."""
    bytes_per_s, flop_per_s = rates(limits)
    return 1e6 * max(work["bytes"] / bytes_per_s, work["flop"] / flop_per_s)


def _run(result: dict) -> list[Judged]:
    table, scale = _table(), factor(result) or 1.0
    limits = result["ceilings"]
    bytes_per_s, flop_per_s = rates(limits)
    judged = []
    for row in result["rows"]:
        us, floor = row["us"], floor_us(row, limits)
        peers = {
            name: scale * peer
            for name, peer in table.get(_shape(row), {}).items()
            if peer is not None and name != OTHER_RUN
        } | row["peers_us"]
        best = min(peers, key=peers.__getitem__, default=None)
        tflops = row["flop"] / us / 1e6
        judged.append(
            Judged(
                shape=_shape(row),
                us=us,
                floor_us=floor,
                share=floor / us,
                tflops=tflops,
                table_tflops=tflops * TABLE_MATMUL_TFLOPS / limits["matmul_tflops"],
                gbps=row["bytes"] / us / 1e3,
                compute_bound=row["flop"] / flop_per_s > row["bytes"] / bytes_per_s,
                best_peer=best,
                best_us=peers[best] if best else None,
                ratio=us / peers[best] if best else None,
                xla_us=row["xla_us"],
                jit_us=row.get("jit_us"),
            )
        )
    return judged


def _median(rows: list[Judged]) -> Judged:
    """Each number's own median; the best peer is the one most runs name."""

    def middle(name: str) -> float | None:
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return statistics.median(values) if values else None

    numbers = ("us", "floor_us", "share", "tflops", "table_tflops", "gbps")
    numbers += ("best_us", "ratio", "xla_us", "jit_us")
    named = statistics.mode(row.best_peer for row in rows)
    return dataclasses.replace(rows[0], best_peer=named, **{name: middle(name) for name in numbers})


def _table() -> dict[Shape, dict[str, float | None]]:
    rows = json.loads(PEERS.read_text(encoding="utf-8"))["rows"]
    return {_shape(row): row["peers_us"] for row in rows}


def _shape(row: dict) -> Shape:
    return row["h_q"], row["s_q"], row["batch"], row["seqlen"]
