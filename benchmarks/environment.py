"""What a measurement was taken on."""

import datetime
import pathlib
import platform
import subprocess
import sys

import jax
import jaxlib

from jax_flashmla import status

_CARD = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def describe(commit: str | None = None) -> dict[str, object]:
    """Device, driver, versions, commit, command and date; None for what cannot be found.

    Args:
        commit: Of the sources, where they are not in a git checkout.
    """
    state = status()
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "path": state.path,
        "jax_flashmla": state.version,
        "built_with_cuda": state.cuda,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "commit": commit or _first_line("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "command": " ".join(["python", *map(_without_folder, sys.argv)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": card(),
    }


def _without_folder(word: str) -> str:
    """The last part of a path that begins with / or a dot: folders are this machine's business."""
    path = pathlib.PurePath(word)
    return path.name if path.is_absolute() or word.startswith(".") else word


def card() -> dict[str, str] | None:
    """Driver, clocks (MHz), power (W) and temperature of the first GPU right now."""
    line = _first_line("nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader,nounits")
    return dict(zip(_CARD.split(","), line.split(", "), strict=True)) if line else None


def links() -> str | None:
    """How the first GPU is linked to the others, such as "X NV18 NV18 NV18"."""
    lines = _lines("nvidia-smi", "topo", "-m")
    first = next((line.split() for line in lines if line.startswith("GPU0")), None)
    kinds = "X", "NV", "P", "SYS", "NODE"
    return " ".join(x for x in first[1:] if x.startswith(kinds)) if first else None


def _first_line(*command: str) -> str | None:
    return next(iter(_lines(*command)), None)


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
