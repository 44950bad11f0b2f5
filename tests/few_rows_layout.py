"""What the simulated roles for few rows share: barriers and pieces of shared memory."""

from barrier_machine import Machine, Region

# As in cuda/decode_few/config.h and storage.h; a test compares them. `slots`: by padded rows.
CONSTANTS = {
    "slots_8": 8,
    "slots_16": 7,
    "slots_24": 7,
    "slots_32": 6,
    "page_parts": 3,
    "part_bytes": 24576,
    "weight_slots": 4,
    "score_warps": 4,
    "value_warps": 8,
    "first_known_arrivals": 1,
    "part_full_arrivals": 1,
    "part_empty_arrivals": 8,
    "query_full_arrivals": 2,
    "query_empty_arrivals": 12,
    "weights_ready_arrivals": 16,
    "sums_ready_arrivals": 16,
    "page_max_buffers": 2,
    "row_sum_buffers": 2,
    "query_buffers": 2,
    "assignment_buffers": 2,
    "barrier_count": 25,
}
PARTS = range(CONSTANTS["page_parts"])
LAST = PARTS[-1]
WEIGHT_SLOTS = CONSTANTS["weight_slots"]
WARPS = range(CONSTANTS["score_warps"])
VALUE_WARPS = range(CONSTANTS["value_warps"])
QUERY_BYTES = 16 * 1152
SPEAKING_LANES = 4  # of a warp: one for each two rows of a block of eight
FIRST = ("first_known",)


def slot_of(part: int, slots: int) -> tuple[int, int]:
    """The slot of a part, counted from the block's first, and how often it was used before."""
    return part % slots, part // slots


def add_barriers(m: Machine, slots: int) -> None:
    for slot in range(slots):
        m.add_barrier("part_full", slot, arrivals=CONSTANTS["part_full_arrivals"])
        m.add_barrier("part_empty", slot, arrivals=CONSTANTS["part_empty_arrivals"])
    for slot in range(WEIGHT_SLOTS):
        m.add_barrier("weights_ready", slot, arrivals=CONSTANTS["weights_ready_arrivals"])
    for parity in range(2):
        for name in ("query_full", "query_empty", "sums_ready"):
            m.add_barrier(name, parity, arrivals=CONSTANTS[f"{name}_arrivals"])
    m.add_barrier(*FIRST, arrivals=CONSTANTS["first_known_arrivals"])
    for role in ("score_warps", "value_warps"):
        m.add_barrier(role, arrivals=CONSTANTS[role])


def buffer(m: Machine, name: str, count: int, *key: int) -> Region:
    """One of the buffers that pages or items take in turn."""
    buffers = dict(m.faults.buffers).get(name, CONSTANTS.get(f"{name}_buffers", WEIGHT_SLOTS))
    return m.region(name, count % buffers, *key)


def part_regions(m: Machine, slot: int, part: int) -> list[Region]:
    """Keys; the rows behind the last key and the rotary tile as far as each warp writes there."""
    tail = [m.region("tail", slot, w) for w in WARPS]
    rope = [m.region("rope", slot, w) for w in WARPS] if part == LAST else []
    return [m.region("part", slot), *tail, *rope, *later_rows(m, slot, part)]


def later_rows(m: Machine, slot: int, part: int) -> list[Region]:
    """Keys where output beyond the first eight rows is staged, by the warp that does it."""
    return [m.region("later", slot, w) for w in VALUE_WARPS if has_columns(w, part)]


def has_columns(value_warp: int, part: int) -> bool:
    """Whether a warp's half has columns in a part: the left one in the first two."""
    return part != (LAST if value_warp < len(WARPS) else 0)
