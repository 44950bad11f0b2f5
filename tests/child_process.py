"""What a test's child process needs to import: the package under test, and the tests' modules."""

import os
from pathlib import Path

import jax_flashmla

PROXIES = {"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"}


def environment(*, cpu_devices: int | None = None) -> dict[str, str]:
    """The environment of a Python script of these tests, run with -P.

    Args:
        cpu_devices: JAX sees as many host devices and nothing else; None: what it finds.
    """
    kept = {name: value for name, value in os.environ.items() if name not in PROXIES}
    folders = [Path(jax_flashmla.__file__).parents[1], Path(__file__).parent]
    kept["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    if cpu_devices:
        kept["JAX_PLATFORMS"] = "cpu"
        kept["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cpu_devices}"
    return kept
