import importlib.util

import pytest

NEEDED = ("torch", "transformers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-judge", action="store_true", help="fail where torch or transformers is missing"
    )


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and config.getoption("--require-judge", default=False):
        raise pytest.UsageError(f"--require-judge: {', '.join(missing)} cannot be imported")
