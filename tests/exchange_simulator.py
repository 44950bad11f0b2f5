"""The protocol of `cuda/exchange/kernel.cuh`, run by devices of any speed and any order of writes.

A device runs its exchanges one after the other. In each, warps walk their rows as the kernel does:
write, merge, in two rounds also send and receive. Between any two steps any other warp of any
device may run; what was written arrives at any time, writes of one device to one place in their
order, all of them before its kernel ends. A row is two chunks that arrive and are read one by one.

What is merged has to be of this exchange, from every device; nobody may wait for ever.
"""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Generator, Sequence

CHUNKS, WARPS = 2, 2
Steps = Generator[bool, None, None]  # whether a step is one of waiting
Place = tuple[int, int, int, int, int]  # owner, turn, writer, row, chunk


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One exchange: who takes part, in the order of the merge, how many rows, in which way."""

    group: tuple[int, ...]
    rows: int
    two_rounds: bool


class ProtocolError(Exception):
    """The protocol gave a wrong row, or stopped."""


class World:
    """Slots of all devices, writes on their way, counts of exchanges.

    Args:
        turns: slots that are used in turn; the kernel has two.
        seed: of everything that happens in some order.
    """

    def __init__(self, *, turns: int, seed: int) -> None:
        self.turns, self.random = turns, random.Random(seed)
        self.slots: dict[Place, tuple[int, object]] = {}
        self.on_the_way: dict[int, dict[Place, list]] = defaultdict(lambda: defaultdict(list))
        self.exchanges: dict[tuple[int, int], int] = defaultdict(int)

    def write(self, writer: int, owner: int, row: int, number: int, value: object) -> None:
        """Sends a row; each chunk carries the number."""
        for chunk in range(CHUNKS):
            place = owner, number % self.turns, writer, row, chunk
            self.on_the_way[writer][place].append((number, value))

    def deliver_one(self, writer: int) -> None:
        """Lets one write of a device arrive, the oldest one of its place."""
        queues = {place: queue for place, queue in self.on_the_way[writer].items() if queue}
        place = self.random.choice(list(queues))
        self.slots[place] = queues[place].pop(0)

    def pending(self, writer: int) -> bool:
        """Whether a device's writes are on their way."""
        return any(self.on_the_way[writer].values())


def run(exchanges: Sequence[Exchange], devices: int, *, turns: int = 2, seed: int = 0) -> None:
    """Runs exchanges on all devices.

    Raises:
        ProtocolError: a merged row is not what all devices wrote in this exchange, or all wait.
    """
    world = World(turns=turns, seed=seed)
    running = {device: _device(world, device, exchanges) for device in range(devices)}
    idle = 0
    while running:
        writers = [device for device in range(devices) if world.pending(device)]
        if writers and world.random.random() < 0.5:
            world.deliver_one(world.random.choice(writers))
            idle = 0
            continue
        device = world.random.choice(list(running))
        try:
            waits = next(running[device])
        except StopIteration:
            del running[device]
            continue
        idle = idle + 1 if waits else 0
        if idle > 2000 * devices and not writers:
            raise ProtocolError("nobody can go on")


def _device(world: World, me: int, exchanges: Sequence[Exchange]) -> Steps:
    for index, exchange in enumerate(exchanges):
        if me in exchange.group:
            yield from _kernel(world, me, index, exchange)


def _kernel(world: World, me: int, index: int, exchange: Exchange) -> Steps:
    numbers = {other: world.exchanges[me, other] + 1 for other in exchange.group}  # meet
    warps = [
        _warp(world, me, index, exchange, numbers, range(warp, exchange.rows, WARPS))
        for warp in range(WARPS)
    ]
    while warps:
        warp = world.random.choice(warps)
        try:
            yield next(warp)
        except StopIteration:
            warps.remove(warp)
    while world.pending(me):  # a kernel ends when its writes have arrived
        yield True
    for other in exchange.group:  # count
        world.exchanges[me, other] = numbers[other]


def _warp(
    world: World,
    me: int,
    index: int,
    exchange: Exchange,
    numbers: dict[int, int],
    rows: range,
) -> Steps:
    others = [device for device in exchange.group if device != me]

    def merger(row: int) -> int:
        return exchange.group[row % len(exchange.group)] if exchange.two_rounds else me

    def send(row: int, owners: Sequence[int], value: object) -> Steps:
        for owner in owners:
            world.write(me, owner, row, numbers[owner], value)
            yield False

    def receive(row: int, writer: int) -> Generator[bool, None, object]:
        found = {}
        while len(found) < CHUNKS:
            for chunk in range(CHUNKS):
                place = me, numbers[writer] % world.turns, writer, row, chunk
                number, value = world.slots.get(place, (0, None))
                if number == numbers[writer]:
                    found[chunk] = value
            yield len(found) < CHUNKS
        if len(set(found.values())) > 1:
            raise ProtocolError(f"exchange {index}, row {row}: chunks of different rows {found}")
        return found[0]

    for row in rows:  # write
        own = index, me, row
        to = others if not exchange.two_rounds else [merger(row)] if merger(row) != me else []
        yield from send(row, to, own)
    for row in rows:  # merge
        if merger(row) != me:
            continue
        parts = []
        for device in exchange.group:
            parts.append((index, me, row) if device == me else (yield from receive(row, device)))
        _expect(parts, [(index, device, row) for device in exchange.group])
        if exchange.two_rounds:
            yield from send(row, others, ("merged", index, row))
    for row in rows:  # receive
        if merger(row) != me:
            merged = yield from receive(row, merger(row))
            _expect(merged, ("merged", index, row))


def _expect(got: object, expected: object) -> None:
    if got != expected:
        raise ProtocolError(f"got {got}, expected {expected}")
