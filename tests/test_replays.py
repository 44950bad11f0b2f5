"""benchmarks/replays.py spells the kernels' parameters as cuda/params.h does."""

import ctypes
import pathlib
import subprocess
from collections.abc import Callable
from types import ModuleType

import cuda_host
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler")
def test_parameters_lie_where_the_kernels_have_them(
    tmp_path: pathlib.Path, load: Callable[[str], ModuleType]
) -> None:
    params = load("replays").DecodeParams
    program = tmp_path / "decode_params"
    source = ROOT / "tests" / "decode_params.cc"
    command = [cuda_host.compiler(), "-std=c++20", source, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    theirs = {name: int(offset) for name, offset in map(str.split, told.splitlines())}
    ours = {name: getattr(params, name).offset for name, _ in params._fields_}
    assert ours | {"size": ctypes.sizeof(params)} == theirs


def test_without_a_gpu_there_is_no_library(load: Callable[[str], ModuleType]) -> None:
    assert load("replays").load(pathlib.Path("none")) == "there is no GPU"
