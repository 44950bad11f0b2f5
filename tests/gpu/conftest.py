import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from jax_flashmla.testing import checking
from jax_flashmla.testing.cases import Case, Shape

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-results", help="file that gets one JSON line per finished test")
    parser.addoption(
        "--rehearse", action="store_true", help="run the GPU tests small and portable, on a CPU"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks all tests here `gpu`; a rehearsal takes one in forty of a test's many cases."""
    mine = [item for item in items if HERE in item.path.parents]
    if not config.getoption("--rehearse", default=False):
        for item in mine:
            item.add_marker("gpu")
        return
    seen: dict[str, int] = {}
    for item in mine:
        test = item.nodeid.split("[")[0]
        seen[test] = seen.get(test, -1) + 1
        if seen[test] % 40 and seen[test] > 5:
            items.remove(item)


def tell(config: pytest.Config, **line: str) -> None:
    """Adds a line to the results file at once, so that a hang loses only its own test."""
    if path := config.getoption("--gpu-results", default=None):
        with Path(path).open("a") as results:
            results.write(json.dumps(line) + "\n")


def pytest_runtest_setup(item: pytest.Item) -> None:
    tell(item.config, begins=item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        error = report.longreprtext[-1500:] if report.failed else ""
        tell(item.config, test=report.nodeid, outcome=report.outcome, error=error)
    return report


@pytest.fixture(scope="session")
def rehearsal(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--rehearse", default=False)


@pytest.fixture(scope="session")
def implementation(rehearsal: bool) -> str:
    return "xla" if rehearsal else "cuda"


@pytest.fixture(scope="session")
def fit(rehearsal: bool) -> Callable[[Shape], Shape]:
    """A shape as it is, or small enough for a CPU in a rehearsal."""
    return _shrunk if rehearsal else lambda shape: shape


def _shrunk(shape: Shape) -> Shape:
    most = {"batch": 4, "s_q": 5, "pages": 8, "pool_pages": 32}
    small = {name: min(getattr(shape, name), limit) for name, limit in most.items()}
    return dataclasses.replace(shape, **small, h_q=shape.h_kv * min(shape.h_q // shape.h_kv, 6))


@pytest.fixture(autouse=True)
def nan_in_free_memory(rehearsal: bool) -> None:
    """Whatever a test allocates, results and workspaces too, arrives full of NaN."""
    if not rehearsal:
        checking.fill_free_memory(jax.local_devices()[0])


@pytest.fixture
def check(fit: Callable[[Shape], Shape], implementation: str) -> Callable[[Case], None]:
    """Runs a case and fails with what is wrong about its result."""

    def run(case: Case) -> None:
        small = dataclasses.replace(case, shape=fit(case.shape))
        verdict = checking.check(small, implementation)
        assert verdict.faults == (), f"{case.name}: ratio {verdict.ratio:.2f}"

    return run
