"""Decode over several GPUs of one host: is it what one GPU computes, and how much faster?

    python benchmarks/mesh.py --devices 1,2,4      # results/h200-mesh.json
    python benchmarks/mesh.py --processes 4        # one process per GPU: the same results?
    python benchmarks/mesh.py --export FOLDER      # on a host without GPU: programs for --exported
    python benchmarks/mesh.py --quick              # tiny shapes, also on CPUs: checks the script

On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=4. README.md beside this file says how it
measures, report.py what it means.
"""

import argparse
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))  # operands and checks

import environment
import jax
import mesh_equality
import mesh_exports
import mesh_processes
import mesh_times
import report
import script
import workload
from mesh_workload import SPREADS, Spread

RESULTS = pathlib.Path(__file__).parent / "results" / "h200-mesh.json"


def main() -> None:
    """Checks, measures, keeps the JSON up to date after every part, prints tables."""
    options = _options()
    if options.export:
        mesh_exports.make(options.export, [n for n in options.devices if n > 1])
        return
    # Before JAX takes the memory of the GPUs.
    processes = mesh_processes.run(options.processes, quick=options.quick)
    spreads = script.choose_rows(options, _matching)
    if options.devices[-1] > jax.device_count():
        raise SystemExit(f"error: --devices {options.devices}, JAX sees {jax.device_count()}")
    result = {
        "kind": "mesh",
        "env": environment.describe(options.commit) | {"links": environment.links()},
        "quick": options.quick,
        "devices": options.devices,
        "equality": [],
        "rows": [],
    }

    def keep(name: str, entries: list[dict]) -> None:
        result[name] += entries
        script.write(result, options, RESULTS)

    if processes:
        keep("equality", mesh_processes.check(processes))
    if not options.no_times:
        mesh_times.measure_rows(
            spreads,
            options.devices,
            quick=options.quick,
            done=lambda entry: keep("rows", [entry]),
        )
    if not options.no_equality:
        for n in options.devices:
            keep("equality", mesh_equality.check(jax.devices()[:n]) if n > 1 else [])
        keep("equality", mesh_exports.check(options.exported, jax.devices()))
    print(report.text([result]))
    if bad := [entry for entry in result["equality"] if entry["passed"] < entry["total"]]:
        raise SystemExit(f"error: {len(bad)} kinds of results are not what one device computes")


def _matching(patterns: str) -> list[Spread]:
    return [x for x in SPREADS if workload.matches(x.name, patterns)]


def _numbers(text: str) -> list[int]:
    return sorted({1, *map(int, text.split(","))})


def _options() -> argparse.Namespace:
    parser = script.parser(__doc__.splitlines()[0], rows="*", results=RESULTS)
    add = parser.add_argument
    add("--devices", type=_numbers, default=[1, 2, 4], help="numbers of GPUs (default 1,2,4)")
    add("--processes", type=int, default=0, help="check so many processes, one GPU each, too")
    add("--no-times", action="store_true", help="check only")
    add("--no-equality", action="store_true", help="measure only")
    add("--export", type=pathlib.Path, metavar="FOLDER", help="only write programs for CUDA there")
    add("--exported", type=pathlib.Path, metavar="FOLDER", help="run the programs of --export")
    return parser.parse_args()


if __name__ == "__main__":
    main()
