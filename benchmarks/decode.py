"""Times one decode op beside its peers, on the rows of peers-h200.json.

    python benchmarks/decode.py --flashmla-op PATH --fa3-op PATH    # results/h200-decode.json
    python benchmarks/decode.py --rows '128x*/h128/*' --no-xla --out some.json
    python benchmarks/decode.py --heads --no-xla --out h.json      # head counts between the table's
    python benchmarks/decode.py --quick                             # tiny shapes: checks the script

README.md beside this file says how it measures, report.py what it means.
"""

import argparse
import dataclasses
import os
import pathlib
import time

import card
import ceilings
import environment
import jax
import lanes
import measure
import peers
import replays
import report
import script
from contenders import OURS, XLA, Chain
from workload import Inputs, Row, load_head_rows, load_rows, make_pool

from jax_flashmla._timing import Seconds

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-decode.json"


def main() -> None:
    """Measures, keeps the JSON up to date after every row, prints tables and verdicts."""
    options = _options()
    # Read when JAX first uses the GPU: torch needs some of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = script.choose_rows(options, load_head_rows if options.heads else load_rows)
    effort = measure.QUICK if options.quick else measure.FULL
    kv_cache = make_pool(rows)
    env = environment.describe(options.commit)
    script.say(f"{env['device']}, {env['path']} path, pool of {kv_cache.nbytes / 1e9:.2f} GB")
    beside, left_out = _peers(options)
    kernels = replays.load(options.runner.parent / replays.LIBRARY)
    if isinstance(kernels, str):
        _leave_out(left_out, replays.NAME, kernels)
    limits = ceilings.measure(kv_cache, effort, options.runner)
    script.say("ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
    chains = _compile(options, rows, kv_cache)

    result = {
        "kind": "heads" if options.heads else "decode",
        "env": env,
        "quick": options.quick,
        "sustained": options.sustained,
        "ceilings": limits,
        "left_out": left_out,
        "rows": [],
    }
    turns = lanes.SUSTAINED if options.sustained else lanes.BURSTS
    turns = lanes.QUICK if options.quick else turns
    ours = chains[OURS.name]
    with card.Sampler() as sampler:
        for row in script.progress(ours, len(ours), "rows"):
            inputs = ours[row].inputs
            started = [lanes.chain_lane(name, of[row]) for name, of in chains.items() if row in of]
            calls = OURS.calls(row)
            if not isinstance(kernels, str):
                started.append(replays.lane(kernels, row, inputs, kv_cache, calls))
            started += _peer_lanes(beside, row, inputs, kv_cache, calls, left_out)
            begin = time.perf_counter()
            timings = lanes.interleave(started, turns)
            result["rows"].append(entry(row, timings, sampler.since(begin)))
            script.write(result, options, RESULTS)
    again = ceilings.measure(kv_cache, effort, options.runner)
    result["ceilings"] = {name: max(limits[name], again[name]) for name in limits}
    env["card_after"] = environment.card()
    script.write(result, options, RESULTS)
    print(report.text([result]))


def entry(row: Row, timings: dict[str, Seconds], state: card.State | None) -> dict[str, object]:
    """A row of the results: what was measured, and the work it stands for."""
    us = {name: seconds.median * 1e6 for name, seconds in timings.items()}
    jit_us = us.pop(OURS.name)
    ours = timings.get(replays.NAME, timings[OURS.name])
    return {
        "h_q": row.h_q,
        "s_q": row.s_q,
        "batch": row.batch,
        "seqlen": row.seqlen,
        "bytes": row.work.bytes,
        "flop": row.work.flop,
        "us": us.pop(replays.NAME, jit_us),
        "jit_us": jit_us,
        "us_low": ours.low * 1e6,
        "us_high": ours.high * 1e6,
        "xla_us": us.pop(XLA.name, None),
        "peers_us": us,
        "card": dataclasses.asdict(state) if state else None,
    }


def _leave_out(left_out: dict[str, str], name: str, reason: str) -> None:
    left_out[name] = reason
    script.say(f"{name}: left out, {reason}")


def _peers(options: argparse.Namespace) -> tuple[list[peers.Peer], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    beside, left_out = [], {}
    for peer, path in ((peers.FLASHMLA, options.flashmla_op), (peers.FA3, options.fa3_op)):
        if reason := peer.load(path):
            _leave_out(left_out, peer.name, reason)
        else:
            beside.append(peer)
    return beside, left_out


def _compile(
    options: argparse.Namespace, rows: list[Row], kv_cache: jax.Array
) -> dict[str, dict[Row, Chain]]:
    """Chains of ours for every row and of XLA's for what compiles in time."""
    begin = time.perf_counter()
    chains = {OURS.name: measure.build(OURS, rows, kv_cache, say=script.say)}
    if not options.no_xla:
        # What matters most first, should the time to compile run out.
        ordered = sorted(rows, key=lambda row: (row.seqlen != 4096, row.s_q, -row.h_q))
        limit = options.xla_compile_seconds
        chains[XLA.name] = measure.build(
            XLA, ordered, kv_cache, say=script.say, compile_seconds=limit
        )
    script.say(f"compiled in {time.perf_counter() - begin:.0f} s")
    return chains


def _peer_lanes(
    beside: list[peers.Peer],
    row: Row,
    inputs: Inputs,
    kv_cache: jax.Array,
    calls: int,
    left_out: dict[str, str],
) -> list[lanes.Lane]:
    started = []
    for peer in beside:
        try:
            started.append(peer.lane(row, inputs, kv_cache, calls))
        except RuntimeError as error:
            _leave_out(left_out, f"{peer.name} {row.name}", str(error).splitlines()[0])
    return started


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0], rows="*", results=RESULTS)
    add = parser.add_argument
    add("--heads", action="store_true", help="rows of other head counts than the table's")
    add("--sustained", action="store_true", help="no rests: at the clock that full power leaves")
    add("--flashmla-op", type=pathlib.Path, help="vLLM's _flashmla_C.abi3.so (default: vllm's)")
    add("--fa3-op", type=pathlib.Path, help="vLLM's _vllm_fa3_C.abi3.so (default: vllm's)")
    add("--runner", type=pathlib.Path, default=ceilings.RUNNER, help="built by make runner")
    add("--no-xla", action="store_true", help="leave gather + einsum out")
    add(
        "--xla-compile-seconds",
        type=float,
        default=120,
        help="XLA rows not compiled by then are left out (default %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
