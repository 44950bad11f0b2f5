"""Runs `one_process.py` in several processes of this host, under jax.distributed."""

import socket
import subprocess
import sys
from pathlib import Path

import child_process
import jax.numpy as jnp
import numpy as np
import one_process

SECONDS = 120
MEMORY_SHARE = "0.2"  # of a GPU: the process that started these may hold the larger part


def run(count: int, folder: Path, *, cpu_devices: int | None = None) -> list[dict[str, np.ndarray]]:
    """What each process found, by its keys; no process outlives the call.

    Args:
        count: Processes.
        folder: For results and logs.
        cpu_devices: Host devices of each process, None for a GPU of its own.

    Raises:
        RuntimeError: A process failed or did not end in time; the text holds what it said.
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    logs = [folder / f"{i}.log" for i in range(count)]
    running = []
    try:
        for i, log in enumerate(logs):
            words = [coordinator, str(count), str(i), str(folder / f"{i}.npz")]
            running.append(_start(words, log, cpu_devices))
        codes = [process.wait(timeout=SECONDS) for process in running]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if codes != [0] * count:
        raise RuntimeError("\n".join(log.read_text()[-3000:] for log in logs))
    return [{k: _read(x) for k, x in np.load(folder / f"{i}.npz").items()} for i in range(count)]


def _read(array: np.ndarray) -> np.ndarray:
    """NumPy's files keep the bits of bfloat16 and forget its name."""
    return array.view(jnp.bfloat16) if array.dtype.kind == "V" else array


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(words: list[str], log: Path, cpu_devices: int | None) -> subprocess.Popen:
    script = Path(one_process.__file__)
    environment = child_process.environment(cpu_devices=cpu_devices)
    if cpu_devices is None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY_SHARE
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-P", str(script), *words],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
