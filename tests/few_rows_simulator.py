"""The roles of the decode kernel for few rows as barrier protocol: cuda/decode_few line by line.

As in barrier_simulator: what a piece of shared memory holds is a tag, every read says which tag it
needs, warps are simulated one by one.
"""

from collections.abc import Callable, Generator, Iterable

from barrier_layout import Item
from barrier_machine import NO_FAULTS, Faults, Machine, Region, Step
from few_rows_layout import (
    CONSTANTS,
    FIRST,
    LAST,
    PARTS,
    QUERY_BYTES,
    SPEAKING_LANES,
    VALUE_WARPS,
    WARPS,
    WEIGHT_SLOTS,
    add_barriers,
    buffer,
    has_columns,
    later_rows,
    part_regions,
    slot_of,
)


def produce(m: Machine, items: list[Item], slots: int, guess: bool | None) -> Step:
    """The producer and the query loader: decode_few::stream_pages and load_queries.

    `guess`: whether the page that was asked for before the items were known is the right one; None
    where none was.
    """
    if guess is not None:
        yield from request_page(m, 0, slots, ("page", 0) if guess else ("guess", 0))
    page = 0
    first: int | None = None  # place of the first page in the ring, once it is known
    for i, item in enumerate(items):
        yield from request_query(m, i)
        yield from assign(m, i)
        for _ in range(item.pages):
            if first is None:
                first = yield from tell_first(m, guess)
            if page > 0 or not guess:
                yield from request_page(m, first + page, slots, ("page", page))
            page += 1
    if guess is not None and first is None:
        yield from discard_page(m)


def tell_first(m: Machine, guess: bool | None) -> Generator[Callable[[], bool] | None, None, int]:
    """Where in the ring the first page is, 0 or, behind a wrong guess, 1."""
    first = int(guess is False)
    if first:
        yield from discard_page(m)
    yield from m.write(m.region("first_slot"), ("first", first))
    yield from m.arrive(*FIRST)
    return first


def discard_page(m: Machine) -> Step:
    for part in PARTS:
        yield from m.wait("part_full", part, phase=0)
        for _ in range(CONSTANTS["part_empty_arrivals"]):
            yield from m.arrive("part_empty", part)


def request_query(m: Machine, i: int) -> Step:
    full = ("query_full", i % 2)
    yield from m.wait("query_empty", i % 2, phase=i // 2 - 1)
    m.barriers[full].arrive(expected_bytes=QUERY_BYTES)
    m.copy([buffer(m, "query", i)], ("query", i), full, QUERY_BYTES)
    yield


def assign(m: Machine, i: int) -> Step:
    yield from m.write(buffer(m, "assignment", i), ("item", i))
    yield from m.arrive("query_full", i % 2)


def request_page(m: Machine, n: int, slots: int, tag: tuple[str, int]) -> Step:
    for part in PARTS:
        slot, use = slot_of(n * len(PARTS) + part, slots)
        if n > 0:  # the same part of the page before has arrived
            before, used = slot_of((n - 1) * len(PARTS) + part, slots)
            yield from m.wait("part_full", before, phase=used)
        yield from m.wait("part_empty", slot, phase=use - 1)
        m.barriers["part_full", slot].arrive(expected_bytes=CONSTANTS["part_bytes"])
        regions = part_regions(m, slot, part)
        m.copy(regions, tag, ("part_full", slot), CONSTANTS["part_bytes"])
        yield


Reading = list[Region]  # by WGMMA of one commit group


class Role:
    """What the warps of both math roles do alike."""

    def __init__(self, m: Machine, warp: int, slots: int, first: int) -> None:
        self.m = m
        self.warp = warp
        self.slots = slots
        self.first = first  # place of the first page in the ring, as it will be told
        self.page = 0  # of the block
        self.reading: list[Region] = []  # by WGMMA

    def read(self, region: Region, tag: tuple[str, int]) -> Step:
        """An ordinary read."""
        region.begin_read(tag, by_async_proxy=False)
        yield
        self.m.end_read([region])

    def begin_read(self, region: Region, tag: tuple[str, int]) -> None:
        region.begin_read(tag)
        self.reading.append(region)

    def begin_item(self, i: int) -> Step:
        yield from self.m.wait("query_full", i % 2, phase=i // 2)
        yield from self.read(buffer(self.m, "assignment", i), ("item", i))

    def read_sums(self, i: int) -> Step:
        for w in WARPS:
            yield from self.read(buffer(self.m, "row_sum", i, w), ("sum", i))

    def learn_first(self) -> Step:
        if self.page == 0:
            yield from self.m.wait(*FIRST, phase=0)
            yield from self.read(self.m.region("first_slot"), ("first", self.first))

    def place(self, part: int) -> tuple[int, int]:
        return slot_of((self.first + self.page) * len(PARTS) + part, self.slots)

    def part_slots(self) -> list[int]:
        return [self.place(part)[0] for part in PARTS]


class ScoresWarp(Role):
    """A warp of decode_few::Scores."""

    meetings = 0  # of the four warps

    def run(self, items: list[Item]) -> Step:
        for i, item in enumerate(items):
            yield from self.begin_item(i)
            for page in range(item.pages):
                yield from self.compute(i)  # [1]
                yield from self.weigh(tail=item.tail and page + 1 == item.pages)  # [2]
                yield from self.publish()  # [3]
                self.page += 1
            yield from self.release_query(i)
            yield from self.end_item(i)  # [6]

    def compute(self, i: int) -> Step:
        yield from self.learn_first()
        for part in PARTS:
            slot, use = self.place(part)
            yield from self.m.wait("part_full", slot, phase=use)
            self.begin_read(buffer(self.m, "query", i), ("query", i))
            rope = [self.m.region("rope", slot, w) for w in WARPS if part == LAST]
            for region in (self.m.region("part", slot), *rope, *later_rows(self.m, slot, part)):
                self.begin_read(region, ("page", self.page))
            yield
        self.m.end_read(self.reading)

    def release_query(self, i: int) -> Step:
        yield from self.m.arrive("query_empty", i % 2)

    def meet(self) -> Step:
        yield from self.m.arrive("score_warps")
        yield from self.m.wait("score_warps", phase=self.meetings)
        self.meetings += 1

    def combine_warps(self, name: str, count: int) -> Step:
        yield from self.m.write(buffer(self.m, name, count, self.warp), (name, count))
        yield from self.meet()
        for w in WARPS:
            yield from self.read(buffer(self.m, name, count, w), (name, count))

    def weigh(self, tail: bool) -> Step:
        yield from self.combine_warps("page_max", self.page)
        if tail:
            for slot in self.part_slots():
                region = self.m.region("tail", slot, self.warp)
                yield from self.m.write(region, ("zero", self.page))

    def publish(self) -> Step:
        slots = self.part_slots()
        weights = self.m.region("rope", slots[LAST], self.warp)
        yield from self.m.write(weights, ("P", self.page))
        yield from self.m.fence("weights", [weights])
        tails = [self.m.region("tail", slot, self.warp) for slot in slots]
        yield from self.m.fence("tail", tails)
        if self.warp == 0:
            yield from self.m.write(buffer(self.m, "factors", self.page), ("factors", self.page))
        slot = self.page % WEIGHT_SLOTS
        yield from self.m.arrive("weights_ready", slot, count=SPEAKING_LANES)

    def end_item(self, i: int) -> Step:
        yield from self.m.write(buffer(self.m, "row_sum", i, self.warp), ("sum", i))
        yield from self.m.arrive("sums_ready", i % 2, count=SPEAKING_LANES)
        yield from self.meet()
        if self.warp == 0:
            yield from self.read_sums(i)  # for lse


class ValuesWarp(Role):
    """A warp of decode_few::Values. Its half has tiles of two parts, in two commit groups."""

    meetings = 0  # of all warps of the values

    @property
    def left(self) -> bool:
        return self.warp < len(WARPS)

    def run(self, items: list[Item]) -> Step:
        for i, item in enumerate(items):
            yield from self.begin_item(i)
            for page in range(item.pages):
                last = page + 1 == item.pages
                reading = yield from self.issue_page(tail=item.tail and last)
                if last:
                    yield from self.last_page(i, item, reading)
                else:
                    yield from self.finish_page(reading)
                self.page += 1
            if not item.pages:
                yield from self.wait_for_sums(i)
            yield from self.read(buffer(self.m, "assignment", i), ("item", i))  # the destination
            yield from self.m.arrive("query_empty", i % 2)

    def issue_page(self, tail: bool) -> Generator[Callable[[], bool] | None, None, list[Reading]]:
        slot = self.page % WEIGHT_SLOTS
        yield from self.learn_first()
        yield from self.m.wait("weights_ready", slot, phase=self.page // WEIGHT_SLOTS)
        yield from self.read(buffer(self.m, "factors", self.page), ("factors", self.page))  # [4]
        slots = self.part_slots()
        reading: list[Reading] = []
        for parts in ((0,), (1,)) if self.left else ((1, 2), (2,)):  # [5]
            for w in WARPS:
                self.begin_read(self.m.region("rope", slots[LAST], w), ("P", self.page))
            for part in parts:
                later = later_rows(self.m, slots[part], part)
                for region in (self.m.region("part", slots[part]), *later):
                    self.begin_read(region, ("page", self.page))
                for w in WARPS:
                    tag = ("zero" if tail else "page", self.page)
                    self.begin_read(self.m.region("tail", slots[part], w), tag)
            reading.append(self.reading)
            self.reading = []
            yield
        return reading

    def finish_page(self, reading: list[Reading]) -> Step:
        freed = ((0,), (1, 2)) if self.left else ((0, 1), (2,))
        for parts, regions in zip(freed, reading, strict=True):
            self.m.end_read(regions)
            for part in parts:
                yield from self.m.arrive("part_empty", self.place(part)[0])

    def last_page(self, i: int, item: Item, reading: list[Reading]) -> Step:
        """The end of an item."""
        yield from self.wait_for_sums(i)  # [7]
        for regions in reading:
            self.m.end_read(regions)
        if item.split:
            yield from self.tell_magnitudes(i)
        else:
            yield from self.meet()
        yield from self.store(i)
        yield from self.free_page()

    def free_page(self) -> Step:
        for slot in self.part_slots():
            yield from self.m.arrive("part_empty", slot)

    def tell_magnitudes(self, i: int) -> Step:
        yield from self.m.write(self.m.region("magnitudes", self.warp), ("most", i))
        yield from self.meet()
        for w in VALUE_WARPS:
            yield from self.read(self.m.region("magnitudes", w), ("most", i))

    def store(self, i: int) -> Step:
        """Eight rows; or sixteen, the second eight staged while the first are stored."""
        last = 0 if self.slots == CONSTANTS["slots_8"] else 1
        staged = []
        for block in range(last + 1):
            mine = self.stage(block)
            for region in mine:  # [8]
                yield from self.m.write(region, ("out", i))
            staged += mine
            if block == last:
                yield from self.m.fence("out", staged)
            yield from self.meet()
            yield from self.store_block(i, block)

    def store_block(self, i: int, block: int) -> Step:
        for part, slot in enumerate(self.part_slots()):  # [9]
            first = [self.m.region("part", slot), *(self.m.region("tail", slot, w) for w in WARPS)]
            for region in later_rows(self.m, slot, part) if block else first:
                yield from self.read(region, ("out", i))

    def stage(self, block: int) -> list[Region]:
        """What stands for the columns of eight rows that this warp stages.

        Of the part in the middle each half has some: of the first rows the left one's stand for
        its tails, the right one's for the rest.
        """
        warp = self.warp % len(WARPS)
        regions = []
        for part, slot in enumerate(self.part_slots()):
            if not has_columns(self.warp, part):
                continue
            if block:
                regions.append(self.m.region("later", slot, self.warp))
                continue
            shared = part not in (0, LAST)
            if not shared or self.left:
                regions.append(self.m.region("tail", slot, warp))
            if warp == 0 and not (shared and self.left):
                rope = [self.m.region("rope", slot, w) for w in WARPS if part == LAST]
                regions += [self.m.region("part", slot), *rope]
        return regions

    def wait_for_sums(self, i: int) -> Step:
        yield from self.m.wait("sums_ready", i % 2, phase=i // 2)
        yield from self.read_sums(i)

    def meet(self) -> Step:
        yield from self.m.arrive("value_warps")
        yield from self.m.wait("value_warps", phase=self.meetings)
        self.meetings += 1


def simulate(
    items: Iterable[Item],
    seed: int,
    slots: int,
    faults: Faults = NO_FAULTS,
    scores_warp: type[ScoresWarp] = ScoresWarp,
    values_warp: type[ValuesWarp] = ValuesWarp,
    guess: bool | None = None,
) -> None:
    """Runs one block over its items in a random interleaving; raises Violation.

    Args:
        items: what the block does.
        seed: of the interleaving.
        slots: of the ring.
        faults: deliberate mistakes.
        scores_warp: the role, or one with a mistake.
        values_warp: the same.
        guess: whether the first page was asked for ahead, and rightly; None: it was not.
    """
    items = list(items)
    m = Machine(seed, faults)
    add_barriers(m, slots)
    m.start("producer", produce(m, items, slots, guess))
    first = int(guess is False)
    for warp in WARPS:
        m.start(f"scores, warp {warp}", scores_warp(m, warp, slots, first).run(items))
    for warp in VALUE_WARPS:
        m.start(f"values, warp {warp}", values_warp(m, warp, slots, first).run(items))
    m.run()
