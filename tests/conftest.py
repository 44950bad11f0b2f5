import importlib
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from quick_script import BENCHMARKS

# Read when JAX starts its CPU client: several host devices, for meshes.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

import jax_flashmla

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail gpu tests that would skip")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    status = jax_flashmla.status()
    if status.path != "kernel":
        refuse = pytest.fail if item.config.getoption("--require-gpu") else pytest.skip
        refuse(f"the kernel does not run here: {status.reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Everything that is not marked gpu tests the portable path, on the host."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return (yield)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of `benchmarks/` by its name: that folder is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def sleeping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes in `time.sleep` alone, however busy the host is."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
