"""Named cases, shared by the tests and the benchmarks.

A `Shape` is what one compiled program is specialised on; a `Case` adds the data: how long the
requests are, how their logits are distributed, how their pages lie in the pool. Both are plain
values with a name, so a failure names what failed and a benchmark row can be looked up.
"""

import dataclasses
import itertools
import random

HEAD_DIM_V = 512
ROPE_DIM = 64
HEAD_DIM_QK = HEAD_DIM_V + ROPE_DIM
PAGE_SIZE = 64

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one compiled program is specialised on: every dimension and static argument."""

    batch: int
    s_q: int
    h_q: int
    h_kv: int = 1
    pages: int = 16  # width of the block table
    pool_pages: int = 8192
    dtype: str = "bfloat16"
    causal: bool = True
    softmax_scale: float = HEAD_DIM_QK**-0.5
    num_sm_parts: int | None = None

    @property
    def rows(self) -> int:
        """Packed query rows per request and KV head."""
        return self.s_q * self.h_q // self.h_kv

    @property
    def capacity(self) -> int:
        """The longest request that the block table can describe, in tokens."""
        return self.pages * PAGE_SIZE

    @property
    def name(self) -> str:
        """A readable name without spaces, unique among shapes of one scale and pool."""
        parts = [f"b{self.batch}", f"sq{self.s_q}", f"h{self.h_q}"]
        parts += [f"kv{self.h_kv}"] if self.h_kv > 1 else []
        parts += [f"w{self.pages}", SHORT_DTYPES[self.dtype]]
        parts += ["causal"] if self.causal else []
        parts += [f"parts{self.num_sm_parts}"] if self.num_sm_parts else []
        return "_".join(parts)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and its data. The field values name entries of `batches` and `logits`."""

    shape: Shape
    lengths: str = "ragged"
    logits: str = "sigma1"
    table: str = "shuffled"
    seed: int = 0
    tags: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Shape and data in one word, as pytest and benchmark tables show it."""
        return f"{self.shape.name}-{self.lengths}-{self.logits}-{self.table}-{self.seed}"


LENGTHS = (
    "edges", "ragged", "full", "skewed", "one_long", "every_other", "around_pages", "whole_pages",
    "shorter_than_s_q", "ones", "zeros",
)  # fmt: skip
LOGITS = (
    "flashmla", "sigma1", "sigma5", "sigma30", "peaked", "sink", "one_hot", "rising",
    "falling", "magnitude1e4", "offset-1e4",
)  # fmt: skip
TABLES = ("shuffled", "in_order", "shared_prefix", "one_page")


def sweep(shape: Shape, count: int, *tags: str) -> tuple[Case, ...]:
    """`count` cases of one shape: every length pattern and distribution, then a seeded mixture."""
    rng = random.Random(shape.name)
    cycles = [itertools.cycle(rng.sample(names, len(names))) for names in (LENGTHS, LOGITS, TABLES)]
    return tuple(
        Case(shape, *(next(cycle) for cycle in cycles), seed=seed, tags=frozenset(tags))
        for seed in range(count)
    )


def small_cases() -> tuple[Case, ...]:
    """Cases that a CPU computes in a moment: one per distribution, over the odd small shapes."""
    shapes = (
        Shape(3, 1, 4, pages=4, pool_pages=16),
        Shape(2, 2, 8, pages=3, pool_pages=16),
        Shape(2, 3, 5, pages=4, pool_pages=16, dtype="float16"),
        Shape(2, 4, 6, h_kv=3, pages=2, pool_pages=8, causal=False),
    )
    data = itertools.product(LOGITS, ("edges", "ragged"))
    return tuple(
        Case(shape, lengths, logits, table, seed, frozenset({"small"}))
        for seed, ((logits, lengths), shape, table) in enumerate(
            zip(data, itertools.cycle(shapes), itertools.cycle(TABLES), strict=False)
        )
    )


def named(cases: tuple[Case, ...], name: str) -> Case:
    """The one case of this name.

    Raises:
        KeyError: no case, or more than one, has the name.
    """
    found = [case for case in cases if case.name == name]
    if len(found) != 1:
        raise KeyError(f"{len(found)} cases are named {name}")
    return found[0]
