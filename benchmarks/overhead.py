"""What a layer costs above its kernels when 61 layers are chained in one jit.

    python benchmarks/overhead.py             # results/h200-overhead.json
    python benchmarks/overhead.py --quick     # tiny shapes: checks the script only

Overhead = time of one call of the chain (back to back, as benchmarks/decode.py times it) minus the
time of one call of the same launches without XLA: the standalone runner (`make runner`) replays a
CUDA graph of 61 calls over as many KV sets, on data of the same distribution and for as long. The
two alternate on the same card; medians.
Summing up the kernels' own durations would not do: the combine starts while the decode kernel ends.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import statistics
import subprocess

import ceilings
import environment
import jax
import jax.numpy as jnp
import numpy as np
import report
import script
from contenders import OURS
from measure import FULL, QUICK, time_call
from workload import Row, make_inputs, make_pool

from jax_flashmla import get_mla_metadata

LAYERS = 61  # DeepSeek-V3's
LIMIT_US = 1.3
METADATA_BATCHES = (128, 4096)
METADATA_ROWS = 128  # packed query rows per request
PROFILED_RUNS = 7
ALTERNATIONS = 3
ROWS = "1x4096/h16/s1,1x4096/h128/s1,16x4096/h16/s1,16x4096/h64/s1,128x1024/h16/s1"
RESULTS = pathlib.Path(__file__).parent / "results" / "h200-overhead.json"


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = _options()
    rows = script.choose_rows(options)[: 1 if options.quick else None]
    on_gpu = jax.default_backend() == "gpu"
    layers = dataclasses.replace(OURS, min_calls=LAYERS, max_calls=LAYERS, run_seconds=math.inf)
    kv_cache = make_pool(rows)

    entries = []
    for row in rows:
        inputs = make_inputs(row, kv_cache.shape[0])
        # The same KV sets in every run, as the replays have: otherwise XLA updates its CUDA graph
        # before each, and the host may need longer for that than the calls take.
        inputs = dataclasses.replace(inputs, tables=inputs.tables[:LAYERS])
        chain = layers.compile(row, inputs, kv_cache)
        calls, replays = [], []
        for _ in range(1 if options.quick else ALTERNATIONS):
            calls.append(time_call(chain, QUICK if options.quick else FULL).median * 1e6)
            if on_gpu:
                replays.append(_replayed_us(options.runner, row))
        entry = {"row": row.name, "layers": LAYERS, "call_us": statistics.median(calls)}
        if on_gpu:
            entry["replayed_us"] = statistics.median(replays)
            entry["overhead_us"] = entry["call_us"] - entry["replayed_us"]
        entries.append(entry)
    # After all other timing: a profiler, once attached, may slow launches down.
    for entry, row in zip(entries, rows, strict=True):
        if on_gpu:
            entry["metadata_us"] = _metadata_us(row.lengths, row.s_q * row.h_q)
        print(_line(entry), flush=True)
    result = {
        "kind": "overhead",
        "env": environment.describe(options.commit),
        "rows": entries,
        "metadata_us": _metadata_of_batches() if on_gpu and not options.quick else {},
    }
    script.write(result, options, RESULTS)
    print(report.text([result]))


def _replayed_us(runner: pathlib.Path, row: Row) -> float:
    """One call of the same launches in a CUDA graph, without XLA."""
    lengths = ",".join(str(length) for length in row.lengths)
    words = [f"h_q={row.h_q}", f"s_q={row.s_q}", f"b={row.batch}", f"len={lengths}"]
    told = subprocess.run(
        [str(runner), *words, f"calls={LAYERS}", f"replay_ms={FULL.seconds * 1e3:.0f}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(re.search(r": ([\d.]+) us", told)[1])


def _metadata_of_batches() -> dict[str, float]:
    """Device time of the schedule of batches with lengths up to 8192."""
    rng = np.random.default_rng(0)
    return {
        str(batch): _metadata_us(rng.integers(1, 8193, batch), METADATA_ROWS)
        for batch in METADATA_BATCHES
    }


def _metadata_us(cache_seqlens: np.ndarray, packed_rows: int) -> float:
    """Device time of the schedule."""
    from jax.experimental.mosaic.gpu import profiler

    schedule = jax.jit(lambda lengths: get_mla_metadata(lengths, packed_rows, 1))
    lengths = jnp.array(cache_seqlens, jnp.int32)
    _, runs = profiler.measure(schedule, aggregate=False, iterations=PROFILED_RUNS)(lengths)
    return statistics.median(1e3 * sum(ms for _, ms in kernels) for kernels in runs)


def _line(entry: dict[str, object]) -> str:
    text = f"{entry['row']}: {LAYERS} calls in one jit, {entry['call_us']:.2f} us each"
    if "replayed_us" not in entry:
        return f"{text}; launches are replayed on a GPU only"
    verdict = "within" if entry["overhead_us"] <= LIMIT_US else "ABOVE"
    return (
        f"{text}; replayed {entry['replayed_us']:.2f} us, {entry['overhead_us']:+.2f} us above that"
        f" ({verdict} {LIMIT_US}); schedule {entry['metadata_us']:.1f} us once per step"
    )


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0], rows=ROWS, results=RESULTS)
    parser.add_argument(
        "--runner", type=pathlib.Path, default=ceilings.RUNNER, help="built by make runner"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
