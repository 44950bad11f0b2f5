"""benchmarks/replays.py spells the kernels' parameters as cuda/params.h does."""

import ctypes
import importlib
import pathlib
import subprocess

import cuda_host
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler")
def test_parameters_lie_where_the_kernels_have_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    params = importlib.import_module("replays").DecodeParams
    program = tmp_path / "decode_params"
    source = ROOT / "tests" / "decode_params.cc"
    command = [cuda_host.compiler(), "-std=c++20", source, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    told = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    theirs = {name: int(offset) for name, offset in map(str.split, told.splitlines())}
    ours = {name: getattr(params, name).offset for name, _ in params._fields_}
    assert ours | {"size": ctypes.sizeof(params)} == theirs


def test_without_a_gpu_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("replays").load(pathlib.Path("none")) == "there is no GPU"
