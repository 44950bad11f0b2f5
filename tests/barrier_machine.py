"""A block's shared memory, barriers and scheduler, for simulated roles.

A warp is a generator: it yields None where another warp may run, or a condition to wait for. The
scheduler keeps warps and copies in an order of priority and always steps the first that is able
to; it moves the one that ran to a random place, often in some runs and rarely in others, so that
runs go from evenly mixed to "everybody but this warp". After Burckhardt et al., "A randomized
scheduler with probabilistic guarantees of finding bugs" (2010).
"""

import dataclasses
import random
from collections.abc import Callable, Generator, Hashable, Iterable

Step = Generator[Callable[[], bool] | None]


class Violation(Exception):  # noqa: N818
    """The protocol allowed something that would give wrong results or hang."""


class Barrier:
    """An mbarrier: a phase is complete once all arrivals and all expected bytes are there."""

    def __init__(self, name: Hashable, arrivals: int) -> None:
        self.name = name
        self.arrivals = arrivals
        self.pending = arrivals
        self.bytes = 0
        self.completed = 0  # phases

    def arrive(self, count: int = 1, expected_bytes: int = 0) -> None:
        if count > self.pending:
            raise Violation(f"{self.name}: {count} arrivals, {self.pending} to come")
        self.bytes += expected_bytes
        self.pending -= count
        self._settle()

    def expect(self, count: int) -> None:
        self.bytes += count

    def complete_bytes(self, count: int) -> None:
        self.bytes -= count
        self._settle()

    def passed(self, phase: int) -> bool:
        """A wait for the parity of `phase`; phase -1 is complete from the start."""
        if self.completed > phase + 1:
            raise Violation(f"{self.name}: phase {self.completed} with a waiter for {phase}")
        passed = self.completed % 2 != phase % 2
        if passed and self.completed != phase + 1:
            raise Violation(f"{self.name}: phase {self.completed} taken for {phase}")
        return passed

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.pending = self.arrivals


@dataclasses.dataclass
class Region:
    """Bytes of shared memory that are written and read together. `tag` says what they hold."""

    name: Hashable
    tag: Hashable = None
    readers: int = 0
    written_by_copy: bool = False
    unfenced: bool = False  # ordinary writes that TMA and WGMMA may not see yet

    def begin_write(self) -> None:
        if self.readers or self.written_by_copy:
            raise Violation(f"{self.name}: overwritten while {self.tag} is in use")
        self.tag = None

    def begin_read(self, tag: Hashable, by_async_proxy: bool = True) -> None:
        if self.written_by_copy or self.tag != tag:
            raise Violation(f"{self.name}: holds {self.tag}, wanted {tag}")
        if by_async_proxy and self.unfenced:
            raise Violation(f"{self.name}: {tag} read without a proxy fence")
        self.readers += 1


@dataclasses.dataclass(frozen=True)
class Faults:
    """Deliberate mistakes: other counts, and steps (`verb what`) that are left out."""

    arrivals: tuple[tuple[str, int], ...] = ()
    buffers: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()


NO_FAULTS = Faults()


class Machine:
    """Barriers and regions by key, and the tasks that run on them."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.churn = self.random.choice([1.0, 0.2, 0.03, 0.005])
        self.barriers: dict[Hashable, Barrier] = {}
        self.regions: dict[Hashable, Region] = {}
        self.tasks: list[tuple[str, Step, list[Callable[[], bool] | None]]] = []

    def add_barrier(self, *key: Hashable, arrivals: int) -> None:
        arrivals = dict(self.faults.arrivals).get(str(key[0]), arrivals)
        self.barriers[key] = Barrier(key, arrivals)

    def region(self, *key: Hashable) -> Region:
        return self.regions.setdefault(key, Region(key))

    # Steps of a warp.

    def wait(self, *key: Hashable, phase: int) -> Step:
        if f"wait {key[0]}" not in self.faults.skipped:
            yield lambda: self.barriers[key].passed(phase)

    def arrive(self, *key: Hashable, count: int = 1) -> Step:
        if f"arrive {key[0]}" not in self.faults.skipped:
            self.barriers[key].arrive(count)
        yield

    def write(self, region: Region, tag: Hashable) -> Step:
        """An ordinary write."""
        region.begin_write()
        region.tag, region.unfenced = tag, True
        yield

    def fence(self, what: str, regions: Iterable[Region]) -> Step:
        if f"fence {what}" not in self.faults.skipped:
            for region in regions:
                region.unfenced = False
        yield

    def end_read(self, regions: list[Region]) -> None:
        for region in regions:
            region.readers -= 1
        regions.clear()

    def copy(self, regions: list[Region], tag: Hashable, key: Hashable, size: int) -> None:
        """Starts a TMA copy, which goes on by itself and counts its bytes in two portions."""
        for region in regions:
            region.begin_write()
            if region.unfenced:
                raise Violation(f"{region.name}: refilled without a proxy fence")
            region.written_by_copy = True

        def progress() -> Step:
            yield
            self.barriers[key].complete_bytes(size // 2)
            yield
            for region in regions:
                region.tag, region.written_by_copy = tag, False
            self.barriers[key].complete_bytes(size - size // 2)

        self.start(f"copy of {tag}", progress())

    # The scheduler.

    def start(self, name: str, steps: Step) -> None:
        self._insert((name, steps, [None]))

    def run(self) -> None:
        while self.tasks:
            able = (i for i, (_, _, wanted) in enumerate(self.tasks) if self._able(wanted[0]))
            index = next(able, None)
            if index is None:
                raise Violation("deadlock: " + ", ".join(name for name, _, _ in self.tasks))
            _, steps, wanted = self.tasks[index]
            try:
                wanted[0] = next(steps)
            except StopIteration:
                del self.tasks[index]
                continue
            if self.random.random() < self.churn:
                self._insert(self.tasks.pop(index))
        for barrier in self.barriers.values():
            if barrier.pending != barrier.arrivals or barrier.bytes:
                raise Violation(f"{barrier.name}: half a phase is left over")

    @staticmethod
    def _able(wanted: Callable[[], bool] | None) -> bool:
        return wanted is None or wanted()

    def _insert(self, task: tuple[str, Step, list[Callable[[], bool] | None]]) -> None:
        self.tasks.insert(self.random.randint(0, len(self.tasks)), task)
