"""The FFI handlers' argument checks, compiled without CUDA and run on the CPU."""

import shutil
import subprocess
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["ffi_arguments", "ffi_cache_arguments", "ffi_exchange_arguments"])
def test_handlers_name_what_they_reject(tmp_path: Path, name: str) -> None:
    jaxlib = util.find_spec("jaxlib")
    assert jaxlib is not None
    assert jaxlib.origin is not None
    headers = Path(jaxlib.origin).parent / "include"
    program = tmp_path / name
    checks = ("arguments", "cache_arguments", "exchange_arguments", "expectation")
    sources = [ROOT / f"cuda/ffi/{name}.cc" for name in checks]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-isystem", headers]
    subprocess.run(["g++", *flags, *sources, ROOT / f"tests/{name}.cc", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
