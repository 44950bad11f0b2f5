"""What a layer costs above its kernels when 61 layers are chained in one jit.

    python benchmarks/overhead.py             # results/h200-overhead.json
    python benchmarks/overhead.py --quick     # tiny shapes: checks the script only

Overhead = time of one call of the chain (back to back, as benchmarks/decode.py times it) minus the
device time of the kernels of one call. The latter is CUPTI's, taken from the same compiled chain
in a separate run, through the profiler that JAX ships for its own kernels. CUPTI sees each kernel
from its start to its end: gaps between kernels are overhead, and where a kernel starts before the
one ahead of it has ended, their overlap counts as negative overhead.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

import environment
import jax
from contenders import OURS, Chain
from measure import FULL, QUICK, time_call
from workload import load_rows, make_inputs, make_pool

from jax_flashmla import get_mla_metadata

LAYERS = 61  # DeepSeek-V3's
LIMIT_US = 1.5
PROFILED_RUNS = 7
ROWS = "1x4096/h16/s1,1x4096/h128/s1,16x4096/h64/s1,128x1024/h16/s1,128x4096/h128/s1"
RESULTS = pathlib.Path(__file__).parent / "results" / "h200-overhead.json"


def main() -> None:
    """Measures, prints a table, writes JSON."""
    options = _options()
    rows = load_rows(options.rows)
    if not rows:
        raise SystemExit(f"error: no row matches {options.rows!r}; a row: 128x4096/h16/s1")
    on_gpu = jax.default_backend() == "gpu"
    if options.quick:
        rows = list(dict.fromkeys(row.shrunk() for row in rows))[:1]
        print(f"--quick on {jax.default_backend()}: tiny shapes, the numbers mean nothing")
    elif not on_gpu:
        raise SystemExit(
            f"error: JAX runs on {jax.default_backend()}, a GPU is needed (or --quick)"
        )
    layers = dataclasses.replace(OURS, min_calls=LAYERS, max_calls=LAYERS)
    kv_cache = make_pool(rows)

    entries, profiled = [], []
    for row in rows:
        inputs = make_inputs(row, kv_cache.shape[0])
        chain = layers.compile(row, inputs, kv_cache)
        seconds = time_call(chain, QUICK if options.quick else FULL)
        entries.append({"row": row.name, "layers": LAYERS, "call_us": seconds.median * 1e6})
        profiled.append(layers.compile(row, inputs, kv_cache, donate=False) if on_gpu else None)
        print(f"{row.name}: {entries[-1]['call_us']:.2f} us per call", file=sys.stderr, flush=True)
    # After all other timing: a profiler, once attached, may slow launches down.
    for entry, row, chain in zip(entries, rows, profiled, strict=True):
        if chain is not None:
            entry |= _kernels(chain)
            entry["overhead_us"] = entry["call_us"] - entry["kernels_us"]
            entry["metadata_us"] = _metadata_us(chain, row.s_q * row.h_q)
        print(_line(entry), flush=True)
    out = options.out or (None if options.quick else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = {"env": environment.describe(), "rows": entries}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _kernels(chain: Chain) -> dict[str, object]:
    """Device time per call, and how often each kernel ran in the whole chain."""
    runs = _profile(chain.compiled, *chain.arguments(chain.inputs.q_latent))
    names = collections.Counter(name.split("(")[0] for name, _ in runs[0])
    return {"kernels_us": _median_us(runs) / chain.calls, "kernels_in_chain": dict(names)}


def _metadata_us(chain: Chain, rows: int) -> float:
    """Device time of the schedule."""
    schedule = jax.jit(lambda lengths: get_mla_metadata(lengths, rows, 1))
    return _median_us(_profile(schedule, chain.inputs.cache_seqlens))


def _profile(compiled: Callable[..., object], *arguments: object) -> list[list[tuple[str, float]]]:
    """(name, ms) of every kernel, of several warm runs."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(compiled, aggregate=False, iterations=PROFILED_RUNS)(*arguments)
    return runs or [[]]


def _median_us(runs: list[list[tuple[str, float]]]) -> float:
    return statistics.median(1e3 * sum(ms for _, ms in kernels) for kernels in runs)


def _line(entry: dict[str, object]) -> str:
    text = f"{entry['row']}: {LAYERS} calls in one jit, {entry['call_us']:.2f} us each"
    if "kernels_us" not in entry:
        return f"{text}; kernels are profiled on a GPU only"
    verdict = "within" if entry["overhead_us"] <= LIMIT_US else "ABOVE"
    return (
        f"{text}; kernels {entry['kernels_us']:.2f} us, {entry['overhead_us']:+.2f} us above them"
        f" ({verdict} {LIMIT_US}); schedule {entry['metadata_us']:.1f} us once per step;"
        f" kernels in the chain: {entry['kernels_in_chain']}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS, help="comma-separated patterns on row names")
    parser.add_argument("--out", type=pathlib.Path, help=f"JSON file (default {RESULTS.name})")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, checks the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
