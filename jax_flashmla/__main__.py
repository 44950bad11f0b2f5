"""Decodes ten moments of a serving trace: `python -m jax_flashmla --trace FILE`."""

import argparse
import math
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp

from jax_flashmla import _demo
from jax_flashmla._dispatch import status
from jax_flashmla._roofline import Ceilings, known_ceilings
from jax_flashmla._sample import sample_trace
from jax_flashmla.trace import Moment, read_trace, take_moments

_HEADER = (
    "   time s  requests     tokens  longest  shared   us/layer"
    "  GB/s unique   total  TFLOP/s  floor   error"
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0 if every check passed, 1 if one did not, 2 for bad arguments."""
    options = _options(arguments)
    try:
        requests = read_trace(options.trace) if options.trace else sample_trace()
        moments = take_moments(
            requests, options.moments, tpot_ms=options.tpot_ms, seed=options.seed
        )
        layers = _layers(options, max(moment.num_pages for moment in moments))
    except OSError as error:
        return _refuse(f"--trace: cannot read {options.trace}: {error.strerror or error}")
    except ValueError as error:
        return _refuse(str(error))

    state = status()
    print(f"ran     {state}")
    name = options.trace or "built-in sample"
    print(f"trace   {name}: {len(requests):,} requests, {options.tpot_ms:g} ms per output token")
    model = _demo.make_model(
        moments, layers=layers, h_q=options.heads, dtype=options.dtype, seed=options.seed
    )
    print(_step_line(model))
    limits = known_ceilings(jax.local_devices()[0].device_kind)
    print(_floor_line(limits))
    return _run(model, moments, limits)


def _run(model: _demo.Model, moments: tuple[Moment, ...], limits: Ceilings | None) -> int:
    on_gpu = jax.default_backend() == "gpu"
    _progress("compiling the step")
    step = _demo.compile_step(model)
    results = []
    print(f"\n{_HEADER}")
    for number, moment in enumerate(moments, start=1):
        _progress(f"[{number}/{len(moments)}] {len(moment.cache_seqlens)} requests")
        result = _demo.run_moment(
            model, step, moment, repeats=10 if on_gpu else 3, seconds=0.05 if on_gpu else 0.2
        )
        results.append(result)
        _progress("")
        print(_line(result, limits), flush=True)
    print(_summary(results, limits))
    faults = [fault for result in results for fault in result.faults]
    for fault in faults:
        print(f"FAILED  {fault}")
    return 1 if faults else 0


def _line(result: _demo.Result, limits: Ceilings | None) -> str:
    moment, work, seconds = result.moment, result.work, result.per_layer.median
    share = f"{work.floor_seconds(limits) / seconds:6.1%}" if limits else "     -"
    return (
        f"{moment.time / 1e3:9.1f} {work.batch:9d} {work.tokens:10,d}"
        f" {int(moment.cache_seqlens.max()):8,d} {1 - work.unique_tokens / work.tokens:7.1%}"
        f" {seconds * 1e6:10.1f} {work.unique_kv_bytes / seconds / 1e9:12.1f}"
        f" {work.kv_bytes / seconds / 1e9:7.1f} {work.flop / seconds / 1e12:8.2f}"
        f" {share} {result.error:7.2f}"
    )


def _summary(results: list[_demo.Result], limits: Ceilings | None) -> str:
    lines = [
        "\nerror   last layer against float64 (root mean square), 1 is a kernel that rounds only P"
        f" and O; worst {max(result.error for result in results):.2f}"
    ]
    if limits:
        shares = [r.work.floor_seconds(limits) / r.per_layer.median for r in results]
        mean = statistics.geometric_mean(shares)
        lines.append(f"floor   floor time over measured time; geometric mean {mean:.1%}")
    return "\n".join(lines)


def _step_line(model: _demo.Model) -> str:
    batch, _, h_q, _ = model.q_rope.shape
    pool = f"{model.layers} × {model.num_pages:,} pages ({model.kv_cache.nbytes / 1e9:.2f} GB)"
    return (
        f"step    {model.layers} layers in one jit, schedule included; {h_q} heads,"
        f" {model.q_rope.dtype}, batches padded to {batch}, pool of {pool}"
    )


def _floor_line(limits: Ceilings | None) -> str:
    if limits is None:
        kind = jax.local_devices()[0].device_kind
        return f"floor   none applies on {kind}: its ceilings have not been measured"
    return (
        f"floor   max(unique bytes / {limits.bytes_per_s / 1e12:g} TB/s,"
        f" FLOP / {limits.flop_per_s / 1e12:g} TFLOP/s), ceilings measured on {limits.device}"
    )


def _layers(options: argparse.Namespace, num_pages: int) -> int:
    fit = _demo.layers_that_fit(num_pages, options.dtype)
    if fit < 1:
        raise ValueError(f"one layer of {num_pages:,} pages does not fit into memory")
    if fit < options.layers:
        print(f"note    {fit} of {options.layers} layers fit into memory")
    return min(fit, options.layers)


def _progress(text: str) -> None:
    """Shows a line on stderr, overwritten by the next one where that is a terminal."""
    if sys.stderr.isatty():
        print(
            f"\r{text:<60}\r" if not text else f"\r{text:<60}", end="", file=sys.stderr, flush=True
        )
    elif text:
        print(text, file=sys.stderr, flush=True)


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_flashmla", description=__doc__)
    add = parser.add_argument
    add("--trace", type=pathlib.Path, metavar="FILE", help="JSON lines; else a built-in sample")
    add("--tpot-ms", type=_positive, default=50.0, help="ms per output token (default 50)")
    add("--moments", type=_count, default=10, help="batches to take (default 10)")
    add("--heads", type=_count, help="query heads (default 128 on a GPU, else 16)")
    add("--layers", type=_count, help="layers in one jit (default 8 on a GPU, else 4)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--seed", type=int, default=0, help="of keys, queries and page order (default 0)")
    options = parser.parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    options.heads = options.heads or (128 if on_gpu else 16)
    options.layers = options.layers or (8 if on_gpu else 4)
    options.dtype = jnp.dtype(options.dtype)
    return options


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
