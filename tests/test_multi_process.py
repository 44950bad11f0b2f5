"""Two processes under jax.distributed compute what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import two_processes

import jax_flashmla

SECONDS = 120
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """What each process found; no process outlives the fixture."""
    folder = tmp_path_factory.mktemp("processes")
    coordinator = f"127.0.0.1:{free_port()}"
    logs = [folder / f"{i}.log" for i in range(two_processes.PROCESSES)]
    running = [start(coordinator, i, folder, log) for i, log in enumerate(logs)]
    try:
        codes = [process.wait(timeout=SECONDS) for process in running]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for process in running:
            process.kill()
            process.wait()
    said = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0] * two_processes.PROCESSES, said
    return [dict(np.load(folder / f"{i}.npz")) for i in range(two_processes.PROCESSES)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(coordinator: str, process: int, folder: Path, log: Path) -> subprocess.Popen:
    script = Path(two_processes.__file__)
    package = Path(jax_flashmla.__file__).parents[1]
    path = os.pathsep.join([str(package), str(script.parent)])
    proxies = {"http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"}
    environment = {k: v for k, v in os.environ.items() if k not in proxies} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={two_processes.LOCAL_DEVICES}",
    }
    arguments = [coordinator, str(process), str(folder / f"{process}.npz")]
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-P", str(script), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.parametrize("name", two_processes.PROGRAMS)
def test_two_processes_compute_what_one_does(
    shards: list[dict[str, np.ndarray]], name: str
) -> None:
    expected = dict(zip(("out", "lse"), one_process(), strict=True))
    places = set()
    for found in shards:
        assert int(found["devices"]) == two_processes.PROCESSES * two_processes.LOCAL_DEVICES
        for key, shard in found.items():
            if key.startswith(f"{name}/"):
                _, result, begin, device = key.split("/")
                rows = slice(int(begin), int(begin) + len(shard))
                wanted = np.asarray(expected[result])[rows]
                np.testing.assert_allclose(shard, wanted, atol=TOLERANCE, rtol=TOLERANCE)
                places.add((result, int(begin), device))
    begins = range(4) if name == "requests" else [0] * 4
    assert len(places) == 8
    assert sorted(begin for result, begin, _ in places if result == "out") == sorted(begins)


def one_process() -> tuple[np.ndarray, np.ndarray]:
    scale = two_processes.SHAPE.softmax_scale
    return jax_flashmla.mla_decode(*two_processes.data().arrays(), softmax_scale=scale)
