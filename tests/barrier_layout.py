"""What the simulated roles share: the decode kernel's barriers and pieces of shared memory."""

import dataclasses

from barrier_machine import Machine, Region

# As in cuda/decode/config.h and storage.h; a test compares them.
CONSTANTS = {
    "page_slots": 2,
    "page_parts": 3,
    "page_boxes": 5,
    "latent_box_bytes": 16384,
    "rope_box_bytes": 8192,
    "query_bytes": 73728,
    "warps_per_half": 4,
    "query_loader_warps": 3,
    "page_full_arrivals": 1,
    "page_empty_arrivals": 4,
    "query_full_arrivals": 3,
    "query_empty_arrivals": 8,
    "weights_ready_arrivals": 32,
    "odd_scored_arrivals": 4,
    "sums_ready_arrivals": 64,
    "row_sum_buffers": 2,
    "assignment_buffers": 2,
    "barrier_count": 22,
}
SLOTS = range(CONSTANTS["page_slots"])
WARPS = range(CONSTANTS["warps_per_half"])
LOADERS = range(CONSTANTS["query_loader_warps"])
LEFT, RIGHT, ROPE = PARTS = range(CONSTANTS["page_parts"])
BOXES = {LEFT: (0, 1), RIGHT: (2, 3), ROPE: (4,)}  # what brings a part
SPEAKING_LANES = 8  # of a warp: one for each pair of rows


@dataclasses.dataclass(frozen=True)
class Item:
    """One request's pages of a part, perhaps none; `tail`: the last page is not full; `split`:
    other parts have more of the request."""

    pages: int
    tail: bool = False
    split: bool = False


def add_barriers(m: Machine) -> None:
    for slot in SLOTS:
        for box in range(CONSTANTS["page_boxes"]):
            m.add_barrier("page_full", slot, box, arrivals=CONSTANTS["page_full_arrivals"])
        for part in PARTS:
            m.add_barrier("page_empty", slot, part, arrivals=CONSTANTS["page_empty_arrivals"])
    for half in (LEFT, RIGHT):
        m.add_barrier("weights_ready", half, arrivals=CONSTANTS["weights_ready_arrivals"])
        m.add_barrier("own_warps", half, arrivals=len(WARPS))
    for name in ("query_full", "query_empty", "odd_scored", "sums_ready"):
        m.add_barrier(name, arrivals=CONSTANTS[f"{name}_arrivals"])


def item_region(m: Machine, name: str, item: int, *key: int) -> Region:
    """One of the buffers that items take in turn."""
    buffers = dict(m.faults.buffers).get(name, CONSTANTS[f"{name}_buffers"])
    return m.region(name, item % buffers, *key)


def box_bytes(box: int) -> int:
    return CONSTANTS["rope_box_bytes" if box in BOXES[ROPE] else "latent_box_bytes"]


def box_regions(m: Machine, slot: int, box: int) -> list[Region]:
    """A box of a page; the rope tile by blocks of 16 rows, since each warp writes its P there."""
    if box in BOXES[ROPE]:
        return [m.region("rope", slot, w) for w in WARPS]
    return [m.region(slot, box)]


def tail_regions(m: Machine, slot: int, box: int) -> list[Region]:
    """The rows behind a page's last key, as far as each warp zeroes them."""
    return [] if box in BOXES[ROPE] else [m.region("tail", slot, box, w) for w in WARPS]
