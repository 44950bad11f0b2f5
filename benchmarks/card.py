"""The card's clock and power while something is timed, through NVML where it is installed."""

import contextlib
import dataclasses
import statistics
import threading
import time
from types import TracebackType
from typing import Self

INTERVAL = 0.02


@dataclasses.dataclass(frozen=True)
class State:
    """Medians over the samples of some time.

    NVML renews them about every 100 ms: they tell rows apart, not the turns within a row.

    Attributes:
        sm_mhz: Clock of the SMs.
        watts: Instantaneous power draw.
    """

    sm_mhz: float
    watts: float


class Sampler:
    """Samples the first GPU from a thread while entered; without NVML it knows nothing."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []  # time, MHz, W
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(Exception):  # NVML's own errors, or no module: nothing to sample
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._samples.append(_sample(pynvml, device))
            self._thread = threading.Thread(target=self._run, args=(pynvml, device), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def since(self, begin: float) -> State | None:
        """The medians since a ``time.perf_counter()``, or None where nothing was sampled."""
        inside = [sample for sample in list(self._samples) if sample[0] >= begin]
        if not inside:
            return None
        _, clocks, watts = zip(*inside, strict=True)
        return State(statistics.median(clocks), statistics.median(watts))

    def _run(self, pynvml: object, device: object) -> None:
        while not self._stop.wait(INTERVAL):
            self._samples.append(_sample(pynvml, device))


def _sample(pynvml: object, device: object) -> tuple[float, float, float]:
    clock = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
    (power,) = pynvml.nvmlDeviceGetFieldValues(device, [pynvml.NVML_FI_DEV_POWER_INSTANT])
    return time.perf_counter(), float(clock), power.value.uiVal / 1e3
