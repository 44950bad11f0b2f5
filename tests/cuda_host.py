"""Builds cuda/tests, the host programs that check the kernels' arithmetic without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Undefined behaviour, integer overflow above all, ends the program.
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined")
TRAP = "-fsanitize-undefined-trap-on-error"  # needs no runtime library


def compiler() -> str | None:
    """Returns a C++ compiler: the one that CXX names, else the first on PATH."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compiles host_tests into a folder; layout_test.cc is checked by compiling."""
    program = folder / "host_tests"
    sources = sorted((ROOT / "cuda/tests").glob("*.cc"))
    command = [compiler(), *FLAGS, TRAP, *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, name: str, text: str = "") -> str:
    """Returns what `host_tests NAME` prints, given a standard input."""
    done = subprocess.run([program, name], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
