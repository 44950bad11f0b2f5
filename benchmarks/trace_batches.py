"""Times decode steps over batches of a request trace: balance, and share of the floor.

    python benchmarks/trace_batches.py --trace FILE    # results/h200-trace.json
    python benchmarks/trace_batches.py --quick         # the built-in sample: checks the script

Batches, step and check are those of ``python -m jax_flashmla --trace``: layers in one jit behind
one schedule, pages shared as the trace's prefixes are. The share is that of the kernels alone, in a
CUDA graph and in bursts as decode.py times them.
"""

import argparse
import ctypes
import itertools
import pathlib

import ceilings
import environment
import jax
import jax.numpy as jnp
import lanes
import measure
import numpy as np
import replays
import report
import script
from workload import PAGE_SIZE, SOFTMAX_SCALE, Inputs, Row, make_pool

from jax_flashmla import _demo, get_mla_metadata
from jax_flashmla._sample import sample_trace
from jax_flashmla.trace import Moment, Request, read_trace, take_moments

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-trace.json"
TPOT_MS, HEADS = (25.0, 50.0, 100.0), (16, 64, 128)
MOMENTS, LAYERS = 10, 4


def main() -> None:
    """Measures, keeps the JSON up to date after every setting, prints tables and verdicts."""
    options = _options()
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not options.quick:
        raise SystemExit("error: the batches need a GPU (or --quick)")
    if options.quick:
        script.say("--quick: a few small batches, the numbers mean nothing")
    requests = read_trace(options.trace) if options.trace else sample_trace()
    effort = measure.QUICK if options.quick else measure.FULL
    large = Row(16, 1, 128, 8192)
    pool = make_pool([large.shrunk() if options.quick else large])
    limits = ceilings.measure(pool, effort, options.runner)
    del pool
    kernels = replays.load(options.runner.parent / replays.LIBRARY)
    if isinstance(kernels, str):
        script.say(f"{replays.NAME}: left out, {kernels}")
        kernels = None
    result = {
        "kind": "trace",
        "env": environment.describe(options.commit),
        "quick": options.quick,
        "ceilings": limits,
        "batches": [],
    }
    settings = list(itertools.product(options.tpot_ms, options.heads))
    for tpot_ms, h_q in script.progress(settings, len(settings), "settings"):
        result["batches"] += time_batches(requests, tpot_ms, h_q, kernels, quick=options.quick)
        script.write(result, options, RESULTS)
    print(report.text([result]))


def time_batches(
    requests: tuple[Request, ...],
    tpot_ms: float,
    h_q: int,
    kernels: ctypes.CDLL | None,
    *,
    quick: bool,
) -> list[dict[str, object]]:
    """The batches of one setting, checked and measured: step and, where they are, kernels alone.

    Raises:
        RuntimeError: A result is wrong.
    """
    moments = take_moments(requests, 1 if quick else MOMENTS, tpot_ms=tpot_ms)
    layers = 1 if quick else LAYERS
    model = _demo.make_model(moments, layers=layers, h_q=h_q, dtype=jnp.bfloat16, seed=0)
    step = _demo.compile_step(model)
    effort = (1, 0.01) if quick else (7, 0.03)
    turns = lanes.QUICK if quick else lanes.BURSTS
    batches = []
    for moment in moments:
        done = _demo.run_moment(model, step, moment, repeats=effort[0], seconds=effort[1])
        if done.faults:
            raise RuntimeError("; ".join(done.faults))
        full = moment.padded(model.q_rope.shape[0], model.max_pages_per_seq)
        kernels_us = None
        if kernels is not None:
            (alone,) = lanes.interleave([replay_lane(kernels, model, full)], turns).values()
            kernels_us = alone.median * 1e6
        batches.append(
            {
                "tpot_ms": tpot_ms,
                "time_s": moment.time / 1e3,
                "h_q": h_q,
                "requests": len(moment.cache_seqlens),
                "tokens": moment.tokens,
                "longest": int(moment.cache_seqlens.max()),
                "bytes": done.work.bytes,
                "flop": done.work.flop,
                "us": done.per_layer.median * 1e6,
                "kernels_us": kernels_us,
                "busiest": busiest(full.cache_seqlens, h_q),
                "error": done.error,
            }
        )
    return batches


def replay_lane(kernels: ctypes.CDLL, model: _demo.Model, moment: Moment) -> lanes.Lane:
    """The model's decode calls on a full batch, back to back in a CUDA graph."""
    table, lengths = jnp.asarray(moment.block_table), jnp.asarray(moment.cache_seqlens)
    batch, s_q, h_q, _ = model.q_rope.shape
    # Replays have a scale of their own; the queries make up for it.
    factor = _demo.SOFTMAX_SCALE / SOFTMAX_SCALE
    inputs = Inputs(
        *((query * factor).astype(query.dtype) for query in (model.q_latent, model.q_rope)),
        tuple(table + layer * model.num_pages for layer in range(model.layers)),
        lengths,
        get_mla_metadata(lengths, h_q, s_q),
    )
    row = Row(h_q, s_q, batch, int(moment.cache_seqlens.max()))
    return replays.lane(kernels, row, inputs, model.kv_cache, model.layers)


def busiest(cache_seqlens: np.ndarray, h_q: int) -> float:
    """Pages of the part that has most, over the mean part's."""
    schedule, _ = get_mla_metadata(jnp.asarray(cache_seqlens), h_q, 1)
    ends = np.concatenate([[0], np.cumsum(-(-cache_seqlens // PAGE_SIZE))])
    begin_idx, begin_page, end_idx, end_page = np.asarray(schedule)[:, :4].T
    pages = ends[end_idx] + end_page - ends[begin_idx] - begin_page
    return float(pages.max() / pages.mean())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trace", type=pathlib.Path, help="JSON lines; else a built-in sample")
    add("--tpot-ms", type=float, nargs="+", default=TPOT_MS, help="ms per output token")
    add("--heads", type=int, nargs="+", default=HEADS, help="query heads")
    add("--runner", type=pathlib.Path, default=ceilings.RUNNER, help="built by make runner")
    add("--out", type=pathlib.Path, help=f"JSON file (default {RESULTS.name})")
    add("--commit", help="of the sources, where they are in no git checkout")
    add("--quick", action="store_true", help="small batches, checks the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
