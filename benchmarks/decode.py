"""Times one decode op on the rows of peers-h200.json, and what XLA offers beside it.

    python benchmarks/decode.py                        # all rows to results/h200-decode.json
    python benchmarks/decode.py --rows '128x*/h128/*' --no-xla --out some.json
    python benchmarks/decode.py --quick                # tiny shapes: checks the script only

README.md beside this file says how it measures.
"""

import argparse
import pathlib

import ceilings
import environment
import report
import script
from contenders import OURS, XLA
from measure import FULL, QUICK, measure
from workload import Row, make_pool

from jax_flashmla._roofline import H200
from jax_flashmla._timing import Seconds

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-decode.json"


def main() -> None:
    """Measures, prints a table, keeps the JSON up to date after every row."""
    options = _options()
    rows = script.choose_rows(options)
    effort = QUICK if options.quick else FULL
    kv_cache = make_pool(rows)
    env = environment.describe(options.commit)
    script.say(f"{env['device']}, {env['path']} path, pool of {kv_cache.nbytes / 1e9:.2f} GB")
    limits = ceilings.measure(kv_cache, effort)
    script.say("ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    entries = {row: entry(row) for row in rows}
    result = {"env": env, "quick": options.quick, "ceilings": limits, "rows": [*entries.values()]}

    for row, seconds in measure(OURS, rows, kv_cache, effort, say=script.say):
        entries[row].update(times(row, seconds))
        script.write(result, options, RESULTS)
    if not options.no_xla:
        # What matters most first, should the time to compile run out.
        ordered = sorted(rows, key=lambda row: (row.seqlen != 4096, row.s_q, -row.h_q))
        for row, seconds in measure(
            XLA,
            ordered,
            kv_cache,
            effort,
            say=script.say,
            compile_seconds=options.xla_compile_seconds,
        ):
            entries[row]["xla_us"] = seconds.median * 1e6
            script.write(result, options, RESULTS)
    env["card_after"] = environment.card()
    script.write(result, options, RESULTS)
    print(report.table(result))


def entry(row: Row) -> dict[str, object]:
    """A row of the results before anything is measured."""
    return {
        "h_q": row.h_q,
        "s_q": row.s_q,
        "batch": row.batch,
        "seqlen": row.seqlen,
        "us": None,
        "floor_us": row.work.floor_seconds(H200) * 1e6,
        "xla_us": None,
        "best_peer": row.best_peer,
        "best_peer_us": row.best_us,
    }


def times(row: Row, seconds: Seconds) -> dict[str, float | None]:
    """What the time of one call means for a row."""
    us = seconds.median * 1e6
    return {
        "us": us,
        "us_low": seconds.low * 1e6,
        "us_high": seconds.high * 1e6,
        "tflops": row.work.flop / seconds.median / 1e12,
        "gbps": row.work.bytes / seconds.median / 1e9,
        "share": row.work.floor_seconds(H200) / seconds.median,
        "ratio_to_best": us / row.best_us if row.best_us else None,
    }


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0], rows="*", results=RESULTS)
    parser.add_argument("--no-xla", action="store_true", help="leave gather + einsum out")
    parser.add_argument(
        "--xla-compile-seconds",
        type=float,
        default=150,
        help="XLA rows not compiled by then are left out (default %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
