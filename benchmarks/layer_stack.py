"""Times one decode step of a model's attention layers, projections included, the MLP left out.

    python benchmarks/layer_stack.py                       # results/h200-layer-stack.json
    python benchmarks/layer_stack.py --rows 'v2lite/*' --no-xla --out some.json
    python benchmarks/layer_stack.py --loop scan           # a scan over stacked weights
    python benchmarks/layer_stack.py --profile             # and the kernels of a layer
    python benchmarks/layer_stack.py --quick               # tiny shapes: checks the script only

Per row: the step, its attention kernels alone, the step with XLA's gather and einsum, and the sum
of two floors: attention, and reading all weights once. README.md beside this file says more.
"""

import argparse
import os
import pathlib
from collections.abc import Callable

# Read when JAX starts: weights and cache of the largest row take 105 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import environment
import jax
import jax.numpy as jnp
import layer_profile
import numpy as np
import script
import stack
from measure import FULL, QUICK, Effort

from jax_flashmla import mla
from jax_flashmla._roofline import H200
from jax_flashmla._timing import time_steps

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-layer-stack.json"
GOAL = 1.25  # of the floors' sum
State = tuple[jax.Array, jax.Array]  # hidden states or queries, pool
COLUMNS = (
    "model / batch × tokens",
    "step us",
    "kernels us",
    "share",
    "XLA us",
    "attention floor us",
    "weight floor us",
    "over floors",
)
LAYER_COLUMNS = (
    "step",
    "attention",
    "attention's floor",
    "products",
    "weights' floor",
    "small kernels",
)


def main() -> None:
    """Measures, prints a table, keeps the JSON up to date after every row."""
    options = _options()
    rows = script.choose_rows(options, stack.load_rows)
    effort = QUICK if options.quick else FULL
    env = environment.describe(options.commit)
    entries: list[dict[str, object]] = []
    result = {
        "kind": "layer_stack",
        "env": env,
        "loop": options.loop,
        "compiler_options": dict(options.compiler_option),
        "rows": entries,
    }
    for model in dict.fromkeys(row.model for row in rows):
        layers = stack.random_layers(model)
        if options.loop == "scan":
            layers = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        for row in (row for row in rows if row.model == model):
            entries.append(measure(row, layers, effort, options))
            script.say(line(entries[-1]))
            script.write(result, options, RESULTS)
        del layers
    env["card_after"] = environment.card()
    script.write(result, options, RESULTS)
    print(table(entries))
    if options.profile:
        print("\nus per layer\n\n" + layer_table(entries))


def measure(
    row: stack.Row, layers: object, effort: Effort, options: argparse.Namespace
) -> dict[str, object]:
    """One row of the results."""
    entry = {
        "model": row.model.name,
        "layers": row.model.layers,
        "batch": row.batch,
        "seqlen": row.seqlen,
        "shared_pages": row.sharers > 1,
        "sharers": row.sharers,
        "attention_floor_us": row.model.layers * row.work.floor_seconds(H200) * 1e6,
        "weight_floor_us": row.weight_floor_seconds(H200) * 1e6,
        "us": None,
        "kernels_us": None,
        "xla_us": None,
    }
    config, model = row.model.config, row.model
    rest = tuple(map(jnp.asarray, stack.tables(row)))
    x = jax.random.normal(jax.random.key(2), (row.batch, 1, config.hidden_size), jnp.bfloat16)
    q_rope, q_latent = (
        jax.random.normal(
            jax.random.key(3), (row.batch, 1, config.num_attention_heads, width), jnp.bfloat16
        )
        for width in (64, 512)
    )
    loop = {"unrolled": stack.unrolled, "scan": stack.scanned}[options.loop]
    runs = [
        ("kernels_us", stack.attention_alone(model), q_latent, (q_rope, *rest)),
        ("us", loop(mla.decode, model), x, (layers, *rest)),
    ]
    if not options.no_xla:
        runs.append(("xla_us", loop(stack.gather_attention, model), x, (layers, *rest)))
    pool = stack.make_pool(row)
    for name, function, start, operands in runs:
        try:
            step, state = compile_step(function, start, pool, operands, options)
            seconds, state = time_steps(step, state, repeats=effort.repeats, seconds=effort.seconds)
        except jax.errors.JaxRuntimeError as error:
            script.say(f"{row.name} {name}: left out, {str(error).splitlines()[0][:200]}")
            pool = pool if not pool.is_deleted() else stack.make_pool(row)
            continue
        if not np.isfinite(np.asarray(state[0])).all():
            raise RuntimeError(f"{row.name} {name}: the step ended in inf or NaN")
        entry[name] = seconds.median * 1e6
        if name == "us":
            entry |= {"us_low": seconds.low * 1e6, "us_high": seconds.high * 1e6}
        if name == "us" and options.profile:
            events, state = layer_profile.profile(step, state)
            entry["layer_kernels"] = layer_profile.layer_kernels(events)
            script.say(f"{row.name}: {layer_profile.text(entry['layer_kernels'])}")
        pool = state[1]
    if entry["us"]:
        entry["over_floors"] = entry["us"] / (
            entry["attention_floor_us"] + entry["weight_floor_us"]
        )
    if entry["us"] and entry["kernels_us"]:
        entry["kernel_share"] = entry["kernels_us"] / entry["us"]
    return entry


def compile_step(
    function: object,
    start: jax.Array,
    pool: jax.Array,
    operands: tuple,
    options: argparse.Namespace,
) -> tuple[Callable[[State], State], State]:
    """Compiles one run, state and pool donated; and the state to begin with."""
    jitted = jax.jit(function, donate_argnums=(0, 1))
    lowered = jitted.lower(start, pool, *operands)
    compiled = lowered.compile(compiler_options=dict(options.compiler_option) or None)
    # Over the host: `start` is used again, and what is donated is gone.
    return lambda state: compiled(*state, *operands), (jnp.asarray(np.asarray(start)), pool)


def table(entries: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += [line(entry) for entry in entries]
    over = [entry["over_floors"] for entry in entries if "over_floors" in entry]
    within = sum(value <= GOAL for value in over)
    lines.append(f"\n{within} of {len(over)} rows within {GOAL} of the floors")
    if any(entry["shared_pages"] for entry in entries):
        lines.append("\n*: the cache does not fit; requests share pages, and the floor counts once")
    return "\n".join(lines)


def layer_table(entries: list[dict[str, object]]) -> str:
    """What a layer's time goes to, as Markdown."""
    header = "model, batch × tokens", *LAYER_COLUMNS
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for entry in entries:
        times = dict.fromkeys(LAYER_COLUMNS, 0.0)
        for column, name in (
            ("step", "us"),
            ("attention's floor", "attention_floor_us"),
            ("weights' floor", "weight_floor_us"),
        ):
            times[column] = entry[name] / entry["layers"]
        for kernel in entry.get("layer_kernels", []):
            times[layer_profile.kind(kernel["kernel"])] += kernel["us"]
        cells = [f"{times[column]:.1f}" for column in LAYER_COLUMNS]
        name = f"{entry['model']}, {entry['batch']} × {entry['seqlen']}"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def line(entry: dict[str, object]) -> str:
    """A row of the table."""
    star = f" * ({entry['sharers']} share)" if entry["shared_pages"] else ""
    cells = [
        f"{entry['model']} / {entry['batch']} × {entry['seqlen']}{star}",
        _number(entry["us"]),
        _number(entry["kernels_us"]),
        f"{entry['kernel_share']:.0%}" if "kernel_share" in entry else "-",
        _number(entry["xla_us"]),
        _number(entry["attention_floor_us"]),
        _number(entry["weight_floor_us"]),
        f"{entry['over_floors']:.2f}" if "over_floors" in entry else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0], rows="*", results=RESULTS)
    parser.add_argument("--no-xla", action="store_true", help="leave gather + einsum out")
    parser.add_argument(
        "--loop",
        choices=("unrolled", "scan"),
        default="unrolled",
        help="layers one after the other in the program, or a scan over stacked weights",
    )
    parser.add_argument("--profile", action="store_true", help="also list a layer's kernels")
    parser.add_argument(
        "--compiler-option",
        action="append",
        default=[],
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="of XLA, such as xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    )
    return parser.parse_args()


def _name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    return name, value


if __name__ == "__main__":
    main()
