"""What gets built and installed: with and without the CUDA kernels, and how well ptxas did."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jax_flashmla
from jax_flashmla import _ffi

ROOT = Path(__file__).parents[1]
HAS_KERNELS = importlib.util.find_spec("jax_flashmla._cuda") is not None
IS_INSTALLED = jax_flashmla.__version__ != "0+unknown"

needs_installation = pytest.mark.skipif(not IS_INSTALLED, reason="a bare source tree")
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="a portable-only installation")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")


def test_types_are_shipped() -> None:
    package = resources.files("jax_flashmla")
    assert (package / "py.typed").is_file()
    assert (package / "_cuda.pyi").is_file()


@needs_installation
def test_jax_is_the_only_runtime_dependency() -> None:
    required = metadata.requires("jax-flashmla") or []
    assert [line for line in required if "extra ==" not in line] == ["jax>=0.10"]


@pytest.mark.skipif(HAS_KERNELS, reason="the kernels are built")
def test_portable_only_installation_says_so() -> None:
    status = jax_flashmla.status()
    assert status.cuda is None
    assert status.path == "portable"
    assert "portable-only" in (_ffi.load().missing or "")


@needs_kernels
def test_build_info_and_status_agree() -> None:
    from jax_flashmla import _cuda

    info = _cuda.build_info()
    assert re.fullmatch(r"\d+\.\d+", str(info["cuda_version"]))
    assert info["arch"] == "sm_90a"
    assert jax_flashmla.status().cuda == info["cuda_version"]


@needs_kernels
def test_handlers_run_on_the_oldest_supported_jax() -> None:
    """A runtime refuses handlers of a newer FFI than its own; JAX 0.10 has 0.3."""
    from jax_flashmla import _cuda

    major, minor = str(_cuda.build_info()["xla_ffi_version"]).split(".")
    assert int(major) == 0
    assert int(minor) <= 3


@needs_kernels
def test_registrations_hold_all_targets_and_both_stages() -> None:
    from jax_flashmla import _cuda

    stages = {target: set(handlers) for target, handlers in _cuda.registrations().items()}
    both = {"initialize", "execute"}
    assert stages == dict.fromkeys(_ffi.TARGETS, both)


@needs_kernels
def test_a_handler_called_on_the_wrong_platform_returns_an_error() -> None:
    from jax_flashmla import _cuda

    handlers = _cuda.registrations()[_ffi.SCHEDULE_TARGET]
    jax.ffi.register_ffi_target("schedule_on_the_wrong_platform", handlers, platform="cpu")
    results = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 8), (3,))]
    call = jax.ffi.ffi_call("schedule_on_the_wrong_platform", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match="stream"):
        jax.block_until_ready(call(jnp.zeros(2, jnp.int32)))


def ptxas_complaints(report: str) -> list[str]:
    """Returns the lines of a ptxas report that cost speed without being warnings.

    Spills and stack frames; C7507, C7508: setmaxnreg ignored; C7510 to C7520: serialised WGMMA.
    """
    spill = r"\b[1-9]\d* bytes (stack frame|spill)"
    note = r"\bC75(0[78]|1\d|20)\b|setmaxnreg ignored|wgmma.*serializ"
    return [line for line in report.splitlines() if re.search(f"{spill}|{note}", line)]


@pytest.mark.parametrize(
    "line",
    [
        "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
        "    0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads",
        "ptxas info    : (C7507) Potential Performance Loss: 'setmaxnreg' ignored.",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored.",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized.",
        "ptxas info    : (C7520) Potential Performance Loss",
    ],
)
def test_ptxas_complaint_is_seen(line: str) -> None:
    assert ptxas_complaints(f"ptxas info    : 0 bytes gmem\n{line}\n") == [line]


@needs_kernels
def test_ptxas_has_no_complaint() -> None:
    report = (resources.files("jax_flashmla") / "_cuda.ptxas.txt").read_text()
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_90a'", report)
    assert kernels
    assert report.count("0 bytes spill stores, 0 bytes spill loads") >= len(kernels)
    assert ptxas_complaints(report) == []


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures the build with CMake, no CUDA compiler in sight."""
    path = os.pathsep.join(["/usr/bin", "/bin"])
    hidden = {"CUDACXX", "CUDA_HOME", "CUDA_PATH"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"PATH": path}
    command = [shutil.which("cmake"), "-S", ROOT, "-B", build, *options]
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("nvcc cannot be hidden here")
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_cmake
@pytest.mark.parametrize(
    ("options", "succeeds", "text"),
    [
        ((), True, "portable-only build, without the CUDA kernels: there is no nvcc"),
        (("-DJAX_FLASHMLA_CUDA=OFF",), True, "JAX_FLASHMLA_CUDA is OFF"),
        (("-DJAX_FLASHMLA_CUDA=ON",), False, "JAX_FLASHMLA_CUDA is ON, but there is no nvcc"),
        (("-DJAX_FLASHMLA_CUDA=YES",), False, "got YES, expected AUTO, ON or OFF"),
        (
            ("-DJAX_FLASHMLA_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/nowhere/nvcc"),
            False,
            "/nowhere/nvcc does not run",
        ),
    ],
    ids=["auto", "off", "on", "misspelt", "broken"],
)
def test_build_option(tmp_path: Path, options: tuple[str, ...], succeeds: bool, text: str) -> None:
    python = f"-DPython_EXECUTABLE={sys.executable}"
    done = configure(tmp_path, python, *options)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == succeeds, said
    assert text in said
