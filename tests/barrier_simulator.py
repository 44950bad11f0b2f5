"""The decode kernel's roles as barrier protocol: cuda/decode/load.cuh and math.cuh line by line.

Values are left out; what a piece of shared memory holds is a tag (page 7 of the part's walk, P of
page 7, ...), and every read says which tag it needs. Warps are simulated one by one: a WGMMA is
four independent reads, which allows more than the hardware does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from barrier_layout import (
    BOXES,
    CONSTANTS,
    LEFT,
    LOADERS,
    PARTS,
    RIGHT,
    ROPE,
    SLOTS,
    SPEAKING_LANES,
    WARPS,
    Item,
    add_barriers,
    box_bytes,
    box_regions,
    item_region,
    tail_regions,
)
from barrier_machine import NO_FAULTS, Faults, Machine, Region, Step


def stream_pages(m: Machine, items: list[Item], order: Sequence[int]) -> Step:
    for n in range(sum(item.pages for item in items)):
        slot, use = n % len(SLOTS), n // len(SLOTS)
        for part in order:
            yield from m.wait("page_empty", slot, part, phase=use - 1)
            for box in BOXES[part]:
                yield from request_box(m, slot, box, ("page", n))


def request_box(m: Machine, slot: int, box: int, tag: tuple[str, int]) -> Step:
    full, size = ("page_full", slot, box), box_bytes(box)
    m.barriers[full].arrive(expected_bytes=size)
    m.copy(box_regions(m, slot, box) + tail_regions(m, slot, box), tag, full, size)
    yield


def load_queries(m: Machine, items: list[Item], loader: int) -> Step:
    """By TMA, as where there is one KV head."""
    for i in range(len(items)):
        yield from m.wait("query_empty", phase=i - 1)
        if loader == 0:
            yield from request_query(m, i)
        yield from assign(m, i, loader)
        yield from m.arrive("query_full")


def copy_queries(m: Machine, items: list[Item], loader: int) -> Step:
    """By ordinary copies of all loaders, as with several KV heads."""
    for i in range(len(items)):
        yield from m.wait("query_empty", phase=i - 1)
        yield from copy_query(m, i, loader)
        yield from assign(m, i, loader)
        yield from m.arrive("query_full")


def request_query(m: Machine, i: int) -> Step:
    size = CONSTANTS["query_bytes"]
    m.barriers[("query_full",)].expect(size)
    m.copy([m.region("query", part) for part in LOADERS], ("query", i), ("query_full",), size)
    yield


def copy_query(m: Machine, i: int, loader: int) -> Step:
    rows = m.region("query", loader)
    yield from m.write(rows, ("query", i))
    yield from m.fence("query", [rows])


def assign(m: Machine, i: int, loader: int) -> Step:
    """What item `i` is and where its rows go: one loader says so."""
    if loader == 0:
        yield from m.write(item_region(m, "assignment", i), ("item", i))


class MathWarp:
    """A warp of one half; its methods are those of decode::Math."""

    def __init__(self, m: Machine, half: int, warp: int) -> None:
        self.m = m
        self.half = half
        self.other = 1 - half
        self.warp = warp
        self.item = -1
        self.sums = 0  # items with pages that passed
        self.count = 0  # pages that passed
        self.own_meetings = 0  # of the half's warps
        self.odd_pages = 0  # whose scores the right half had
        self.others_pages = 0
        self.reading: list[Region] = []  # by WGMMA

    def run(self, items: list[Item]) -> Step:
        for item in items:
            self.item += 1
            yield from self.begin_item()
            yield from self.do_pages(item) if item.pages else self.skip_pages()
            yield from self.read_assignment()  # the destination, at the latest
            if item.pages:
                yield from self.end_item()

    def begin_item(self) -> Step:
        yield from self.m.wait("query_full", phase=self.item)
        yield from self.read_assignment()

    def do_pages(self, item: Item) -> Step:
        pair = self.left_pair if self.half == LEFT else self.right_pair
        for page in range(0, item.pages, 2):
            yield from pair(item, page)
            self.count += min(2, item.pages - page)

    def skip_pages(self) -> Step:
        yield from self.m.arrive("query_empty")

    def read_assignment(self) -> Step:
        yield from self.read(item_region(self.m, "assignment", self.item), ("item", self.item))

    def left_pair(self, item: Item, page: int) -> Step:
        even, odd = self.count, self.count + 1
        has_odd = page + 1 < item.pages
        last = page + 2 >= item.pages
        yield from self.compute_scores(even)  # [1]
        yield from self.release((even, ROPE))
        yield from self.release_query(item, page)
        tail = item.tail and last and not has_odd
        yield from self.prepare(even, tail)
        yield from self.store_weights(even, self.even_weights())  # [3]
        if even % 3 == 0:  # its page moves the references
            yield from self.store_weights(even, self.even_weights())
        yield from self.publish_weights(even)
        yield from self.issue_values(even, tail)  # [4]
        yield from self.finish_values()
        yield from self.release((even, LEFT))
        if not has_odd:
            return
        yield from self.hear_weights(odd)
        yield from self.issue_other_values(odd, self.odd_weights(odd), item.tail and last)  # [7]
        yield from self.finish_values()
        yield from self.release((odd, LEFT), (odd, ROPE))

    def right_pair(self, item: Item, page: int) -> Step:
        even, odd = self.count, self.count + 1
        has_odd = page + 1 < item.pages
        last = page + 2 >= item.pages
        tail = item.tail and last
        if has_odd:
            yield from self.compute_scores(odd)  # [2]
            yield from self.m.arrive("odd_scored")
        yield from self.release_query(item, page)
        if has_odd:
            yield from self.prepare(odd, tail)
            yield from self.m.wait("odd_scored", phase=self.odd_pages)
            self.odd_pages += 1
            yield from self.store_weights(odd, self.odd_weights(odd))  # [5]
        yield from self.hear_weights(even)
        if has_odd:
            if odd % 3 == 0:  # the references have moved
                yield from self.store_weights(odd, self.odd_weights(odd))
            yield from self.publish_weights(odd)
        even_tail = tail and not has_odd
        yield from self.issue_other_values(even, self.even_weights(), even_tail)  # [6]
        yield from self.finish_values()
        yield from self.release((even, RIGHT))
        if not has_odd:
            return
        yield from self.issue_values(odd, tail)  # [8]
        yield from self.finish_values()
        yield from self.release((odd, RIGHT))

    def release_query(self, item: Item, page: int) -> Step:
        if page + 2 >= item.pages:
            yield from self.m.arrive("query_empty")

    def compute_scores(self, n: int) -> Step:
        slot, use = n % len(SLOTS), n // len(SLOTS)
        reading: list[Region] = []  # the other batch of WGMMA may still run
        for box in range(CONSTANTS["page_boxes"]):
            yield from self.m.wait("page_full", slot, box, phase=use)
            for loader in LOADERS:
                self.begin_read(reading, self.m.region("query", loader), ("query", self.item))
            for region in box_regions(self.m, slot, box):
                self.begin_read(reading, region, ("page", n))
            yield
        self.m.end_read(reading)

    def prepare(self, n: int, tail: bool) -> Step:
        if tail:
            slot = n % len(SLOTS)
            boxes = BOXES[LEFT] + BOXES[RIGHT]
            zeroed = [self.m.region("tail", slot, box, self.warp) for box in boxes]
            for region in zeroed:
                yield from self.m.write(region, ("zero", n))
            yield from self.m.fence("tail", zeroed)
            yield from self.meet_own_warps()

    def store_weights(self, n: int, weights: Region) -> Step:
        yield from self.m.write(weights, ("P", n))
        yield from self.m.fence("weights", [weights])

    def publish_weights(self, n: int) -> Step:
        yield from self.m.write(self.m.region("reference", self.half, self.warp), ("of", n))
        yield from self.m.arrive("weights_ready", self.half, count=SPEAKING_LANES)

    def hear_weights(self, n: int) -> Step:
        yield from self.m.wait("weights_ready", self.other, phase=self.others_pages)
        self.others_pages += 1
        yield from self.read(self.m.region("reference", self.other, self.warp), ("of", n))

    def meet_own_warps(self) -> Step:
        yield from self.m.arrive("own_warps", self.half)
        yield from self.m.wait("own_warps", self.half, phase=self.own_meetings)
        self.own_meetings += 1

    def even_weights(self) -> Region:
        return self.m.region("even_weights", self.warp)

    def odd_weights(self, odd: int) -> Region:
        """P of an odd page takes the place of its rope columns."""
        return self.m.region("rope", odd % len(SLOTS), self.warp)

    def issue_values(self, n: int, tail: bool) -> Step:
        for region, tag in self.values(n, tail):
            self.begin_read(self.reading, region, tag)
        yield

    def issue_other_values(self, n: int, weights: Region, tail: bool) -> Step:
        self.begin_read(self.reading, weights, ("P", n))
        yield from self.issue_values(n, tail)

    def values(self, n: int, tail: bool) -> Iterator[tuple[Region, tuple[str, int]]]:
        slot = n % len(SLOTS)
        for box in BOXES[self.half]:
            yield self.m.region(slot, box), ("page", n)
            for region in tail_regions(self.m, slot, box) if tail else ():
                yield region, ("zero", n)

    def finish_values(self) -> Step:
        self.m.end_read(self.reading)
        yield

    def end_item(self) -> Step:  # [9]
        sums = item_region(self.m, "row_sum", self.item, self.half, self.warp)
        yield from self.m.write(sums, ("sum", self.item))
        yield from self.m.arrive("sums_ready", count=SPEAKING_LANES)
        yield from self.m.wait("sums_ready", phase=self.sums)
        self.sums += 1
        others = item_region(self.m, "row_sum", self.item, self.other, self.warp)
        yield from self.read(others, ("sum", self.item))

    def release(self, *parts: tuple[int, int]) -> Step:
        for n, part in parts:
            yield from self.m.arrive("page_empty", n % len(SLOTS), part)

    def read(self, region: Region, tag: tuple[str, int]) -> Step:
        """An ordinary read."""
        region.begin_read(tag, by_async_proxy=False)
        yield
        self.m.end_read([region])

    @staticmethod
    def begin_read(reading: list[Region], region: Region, tag: tuple[str, int]) -> None:
        region.begin_read(tag)
        reading.append(region)


def simulate(
    items: Iterable[Item],
    seed: int,
    faults: Faults = NO_FAULTS,
    math_warp: type[MathWarp] = MathWarp,
    order: Sequence[int] = PARTS,
    query_loader: Callable[[Machine, list[Item], int], Step] = load_queries,
) -> None:
    """Runs one block over its items in a random interleaving; raises Violation.

    `order` is the producer's order of a page's parts; the other roles and `faults` take mistakes.
    """
    items = list(items)
    m = Machine(seed, faults)
    add_barriers(m)
    m.start("producer", stream_pages(m, items, order))
    for loader in LOADERS:
        m.start(f"query loader {loader}", query_loader(m, items, loader))
    for half, name in ((LEFT, "left"), (RIGHT, "right")):
        for warp in WARPS:
            m.start(f"{name} half, warp {warp}", math_warp(m, half, warp).run(items))
    m.run()
