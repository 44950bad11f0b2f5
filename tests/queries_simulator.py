"""The queries' kernel as barrier protocol: cuda/queries line by line, all blocks of a cluster.

As in few_rows_simulator: what a piece of shared memory holds is a tag, every read says which tag it
needs, warps are simulated one by one. Bulk copies between blocks go on by themselves; no block may
leave before those from and to it have ended.
"""

import dataclasses
from collections.abc import Iterator

from barrier_machine import NO_FAULTS, Faults, Machine, Region, Step, Violation

WARPS_PER_GROUP = 4
COPY_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a cluster does.

    Attributes:
        splits: blocks that share the head, 1 for a block on its own.
        steps: of the width, of each block.
        tiles: of q_latent, of each block.
        groups: math warpgroups; all but the last one have columns of q_nope.
        stages: of the ring.
        is_down: a plain product, without an absorption.
        meets_at_waits: warps arrive at the cluster's barrier where they wait for it, as under
            compute-sanitizer, and not before.
    """

    splits: int
    steps: int
    tiles: int
    groups: int = 3
    stages: int = 3
    is_down: bool = False
    meets_at_waits: bool = False

    @property
    def warps(self) -> int:
        """Of the math roles of a block."""
        return self.groups * WARPS_PER_GROUP


class Cluster:
    """Shared memory and barriers of all blocks."""

    def __init__(self, seed: int, shape: Shape, faults: Faults = NO_FAULTS) -> None:
        self.m = Machine(seed, faults)
        self.shape = shape
        self.left: set[int] = set()  # blocks that are no more
        self.running = dict.fromkeys(range(shape.splits), shape.warps + 1)  # warps
        m = self.m
        m.add_barrier("cluster", arrivals=shape.splits * (shape.warps + 1))
        for block in range(shape.splits):
            for stage in range(shape.stages):
                m.add_barrier("full", block, stage, arrivals=1)
                m.add_barrier("empty", block, stage, arrivals=shape.warps)
            m.add_barrier("columns_ready", block, arrivals=1)
            m.add_barrier("queries_ready", block, arrivals=1)
            m.add_barrier("may_leave", block, arrivals=shape.splits - 1)
            m.add_barrier("begun", block, arrivals=shape.warps + 1)
            m.add_barrier("meet", block, arrivals=shape.warps)
            for group in range(shape.groups):
                m.add_barrier("group_meet", block, group, arrivals=WARPS_PER_GROUP)

    def arrive_begun(self, block: int) -> Step:
        if self.shape.splits == 1:
            yield from self.m.arrive("begun", block)
        elif not self.shape.meets_at_waits:
            yield from self.m.arrive("cluster")

    def wait_for_cluster(self) -> Step:
        if self.shape.meets_at_waits:
            yield from self.m.arrive("cluster")
        yield from self.m.wait("cluster", phase=0)

    def slices(self, name: str, block: int, owner: int) -> list[Region]:
        """By the warp that writes there: columns of sums, or queries, that `owner` adds up."""
        return [self.m.region(name, block, owner, warp) for warp in range(self.shape.warps)]

    def copy_to_block(self, source: list[Region], target: list[Region], barrier: str) -> Step:
        """One bulk copy, which the other block's barrier counts."""
        _, block, *_ = source[0].name
        _, other, *_ = target[0].name
        self.check_there(block, other)
        tags = [region.tag for region in source]
        for region, tag in zip(source, tags, strict=True):
            region.begin_read(tag)
        for region in target:
            region.begin_write()
            region.written_by_copy = True

        def progress() -> Step:
            yield
            self.check_there(block, other)
            for region, tag in zip(target, tags, strict=True):
                region.tag, region.written_by_copy, region.unfenced = tag, False, False
            self.m.end_read(list(source))
            self.m.barriers[barrier, other].complete_bytes(COPY_BYTES)

        self.m.start(f"{barrier} of {other} from {block}", progress())
        yield

    def check_there(self, *blocks: int) -> None:
        for block in blocks:
            if block in self.left:
                raise Violation(f"block {block} has left")
            if self.m.region("barriers", block).tag != "initialised":
                raise Violation(f"block {block} has not begun")

    def leave(self, block: int) -> None:
        """A warp ends; with the last one the block's memory is gone."""
        self.running[block] -= 1
        if self.running[block]:
            return
        busy = [x for x in self.m.regions.values() if x.name[1] == block]
        if any(region.readers or region.written_by_copy for region in busy):
            raise Violation(f"block {block} leaves while its memory is in use")
        self.left.add(block)


class ProducerWarp:
    """The warp that loads; one lane does it all."""

    def __init__(self, cluster: Cluster, block: int) -> None:
        self.c = cluster
        self.m = cluster.m
        self.shape = cluster.shape
        self.block = block
        self.loads = 0

    def run(self) -> Step:
        yield from self.init_barriers()
        yield from self.c.arrive_begun(self.block)
        yield from self.begin()
        if self.shape.splits > 1:
            yield from self.c.wait_for_cluster()
        yield from self.load()
        yield from self.end()

    def end(self) -> Step:
        if self.shape.splits > 1:
            yield from self.m.wait("may_leave", self.block, phase=0)
        self.c.leave(self.block)

    def init_barriers(self) -> Step:
        others = (self.shape.splits - 1) * COPY_BYTES
        if others:
            self.m.barriers["columns_ready", self.block].arrive(expected_bytes=others)
        if others and not self.shape.is_down:  # else nobody waits, and the barrier goes as it is
            self.m.barriers["queries_ready", self.block].arrive(expected_bytes=others)
        yield
        self.m.region("barriers", self.block).tag = "initialised"

    @property
    def ahead(self) -> int:
        return min(self.shape.stages, self.shape.steps)

    def begin(self) -> Step:
        for step in range(self.ahead):  # [1]
            yield from self.load_weights(step)

    def load(self) -> Step:
        for step in range(self.shape.steps):
            if step >= self.ahead:
                yield from self.load_weights(step)
            stage = step % self.shape.stages
            x = [self.m.region("x", self.block, stage)]
            self.m.copy(x, ("x", step), ("full", self.block, stage), COPY_BYTES)
            yield
        for tile in range(self.shape.tiles):  # [6]
            stage = yield from self.next_stage(COPY_BYTES)
            weights = self.weights(stage)[:-1]
            self.m.copy(weights, ("tile", tile), ("full", self.block, stage), COPY_BYTES)
            yield

    def load_weights(self, step: int) -> Step:
        stage = yield from self.next_stage(2 * COPY_BYTES)
        self.m.copy(self.weights(stage), ("step", step), ("full", self.block, stage), COPY_BYTES)
        yield

    def next_stage(self, size: int) -> Step:
        use, stage = divmod(self.loads, self.shape.stages)
        yield from self.m.wait("empty", self.block, stage, phase=use - 1)
        self.m.barriers["full", self.block, stage].arrive(expected_bytes=size)
        self.loads += 1
        return stage

    def weights(self, stage: int) -> list[Region]:
        return [self.m.region("weights", self.block, stage, g) for g in range(self.shape.groups)]


class MathWarp:
    """A warp of queries::Math."""

    def __init__(self, cluster: Cluster, block: int, warp: int) -> None:
        self.c = cluster
        self.m = cluster.m
        self.shape = cluster.shape
        self.block = block
        self.warp = warp
        self.group = warp // WARPS_PER_GROUP
        self.stages_used = 0
        self.meetings = 0
        self.group_meetings = 0

    def run(self) -> Step:
        yield from self.c.arrive_begun(self.block)
        yield from self.wait_until_begun()
        yield from self.project()  # [2]
        yield from (self.add_splits() if self.shape.splits > 1 else self.keep_own())
        if self.shape.is_down:
            yield from self.read_queries([self.block])  # [5]
        else:
            yield from self.absorb()
            if self.block == 0 and self.group == self.shape.groups - 1:
                yield from self.read_queries(range(self.shape.splits))  # [8]
        self.c.leave(self.block)

    def wait_until_begun(self) -> Step:
        if self.shape.splits > 1:
            yield from self.c.wait_for_cluster()
        else:
            yield from self.m.wait("begun", self.block, phase=0)

    def project(self) -> Step:
        for step in range(self.shape.steps):
            stage = yield from self.wait_for_stage()
            reading = [self.m.region("weights", self.block, stage, self.group)]
            reading[0].begin_read(("step", step))
            reading.append(self.m.region("x", self.block, stage))
            reading[1].begin_read(("x", step))
            yield
            self.m.end_read(reading)
            yield from self.release_stage(stage)

    def keep_own(self) -> Step:
        """[3]."""
        region = self.m.region("queries", self.block, 0, self.warp)
        yield from self.m.write(region, ("q", 0))
        yield from self.m.fence("queries", [region])
        yield from self.meet()

    def add_splits(self) -> Step:
        """[4]."""
        own = [self.m.region("own", self.block, o, self.warp) for o in range(self.shape.splits)]
        for owner, region in enumerate(own):
            yield from self.m.write(region, ("columns", self.block, owner))
        yield from self.m.fence("columns", own)
        yield from self.meet()
        yield from self.give_columns()
        yield from self.m.wait("columns_ready", self.block, phase=0)
        yield from self.add()
        yield from self.meet()
        if not self.shape.is_down:
            yield from self.give_sums()
            yield from self.m.wait("queries_ready", self.block, phase=0)
        yield from self.release_others()

    def others(self) -> Iterator[int]:
        """For the one thread that copies, all blocks but its own."""
        return (o for o in range(self.shape.splits) if self.warp == 0 and o != self.block)

    def give_columns(self) -> Step:
        for other in self.others():
            source = self.c.slices("own", self.block, other)
            target = self.c.slices("others", other, self.block)
            yield from self.c.copy_to_block(source, target, "columns_ready")

    def add(self) -> Step:
        for sender in range(self.shape.splits):
            name, key = ("own", self.block) if sender == self.block else ("others", sender)
            for region in self.c.slices(name, self.block, key):
                region.begin_read(("columns", sender, self.block), by_async_proxy=False)
                yield
                self.m.end_read([region])
        region = self.m.region("queries", self.block, self.block, self.warp)
        yield from self.m.write(region, ("q", self.block))
        yield from self.m.fence("queries", [region])

    def give_sums(self) -> Step:
        for other in self.others():
            source = self.c.slices("queries", self.block, self.block)
            target = self.c.slices("queries", other, self.block)
            yield from self.c.copy_to_block(source, target, "queries_ready")

    def release_others(self) -> Step:
        for other in self.others():
            if other in self.c.left:
                raise Violation(f"block {other} has left")
            yield from self.m.arrive("may_leave", other)

    def absorb(self) -> Step:
        """[6]."""
        for tile in range(self.shape.tiles):
            stage = yield from self.wait_for_stage()
            mine = tile % self.shape.groups == self.group
            if mine:
                weights = range(self.shape.groups - 1)
                reading = [self.m.region("weights", self.block, stage, g) for g in weights]
                for region in reading:
                    region.begin_read(("tile", tile))
                for owner in range(self.shape.splits):
                    for region in self.c.slices("queries", self.block, owner):
                        region.begin_read(("q", owner))
                        reading.append(region)
                yield
                self.m.end_read(reading)
            yield from self.release_stage(stage)
            if mine:
                yield from self.store_latent(tile)

    def store_latent(self, tile: int) -> Step:
        """[7]: over the columns, or over x."""
        yield from self.meet_in_group()
        for region in self.out(self.warp):
            yield from self.m.write(region, ("out", tile))
        yield from self.meet_in_group()
        first = self.group * WARPS_PER_GROUP
        for warp in range(first, first + WARPS_PER_GROUP):
            for region in self.out(warp):
                region.begin_read(("out", tile), by_async_proxy=False)
                yield
                self.m.end_read([region])

    def out(self, warp: int) -> list[Region]:
        """Where a warp's part of a tile lies: alone, or over what it has stored before."""
        if self.shape.splits == 1:
            over_x = [self.m.region("x", self.block, self.group)]
            first = warp % WARPS_PER_GROUP == 0
            return [self.m.region("out", self.block, warp), *(over_x if first else [])]
        return [self.m.region("own", self.block, o, warp) for o in range(self.shape.splits)]

    def read_queries(self, owners: range | list[int]) -> Step:
        for owner in owners:
            for region in self.c.slices("queries", self.block, owner):
                region.begin_read(("q", owner), by_async_proxy=False)
                yield
                self.m.end_read([region])

    def wait_for_stage(self) -> Step:
        use, stage = divmod(self.stages_used, self.shape.stages)
        yield from self.m.wait("full", self.block, stage, phase=use)
        self.stages_used += 1
        return stage

    def release_stage(self, stage: int) -> Step:
        yield from self.m.arrive("empty", self.block, stage)

    def meet(self) -> Step:
        yield from self.m.arrive("meet", self.block)
        yield from self.m.wait("meet", self.block, phase=self.meetings)
        self.meetings += 1

    def meet_in_group(self) -> Step:
        yield from self.m.arrive("group_meet", self.block, self.group)
        yield from self.m.wait("group_meet", self.block, self.group, phase=self.group_meetings)
        self.group_meetings += 1


def simulate(
    shape: Shape,
    seed: int,
    faults: Faults = NO_FAULTS,
    math_warp: type[MathWarp] = MathWarp,
    producer_warp: type[ProducerWarp] = ProducerWarp,
) -> None:
    """Runs the blocks of a cluster in a random interleaving; raises Violation."""
    cluster = Cluster(seed, shape, faults)
    for block in range(shape.splits):
        cluster.m.start(f"producer of {block}", producer_warp(cluster, block).run())
        for warp in range(shape.warps):
            cluster.m.start(f"math warp {warp} of {block}", math_warp(cluster, block, warp).run())
    cluster.m.run()
