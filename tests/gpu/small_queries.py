"""A few absorbed query projections, alone and in the attention in one call; for compute-sanitizer.

All operands come from the host, so that nearly all the GPU runs is ours; it is checked there.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import _queries, get_mla_metadata
from jax_flashmla._absorbed_attention import Operands, Static, absorbed_attention
from jax_flashmla.testing import query_oracle
from jax_flashmla.testing.query_oracle import Sizes


@dataclasses.dataclass(frozen=True)
class Case:
    """As in query_cases.py, which a script cannot import."""

    sizes: Sizes
    dtype: str = "bfloat16"
    interleave: bool = False


# How many blocks share a head.
CASES = {
    "eight": Case(Sizes(3, 1, 512, 1, 128)),
    "four, down": Case(Sizes(9, 1, 256, 2, 192, down=True), interleave=True),
    "three, down": Case(Sizes(17, 1, 192, 1, 128, down=True), "float16"),
    "two": Case(Sizes(1, 64, 128, 1, 128), interleave=True),
    "two, tokens in two blocks": Case(Sizes(33, 1, 128, 1, 192), "float16"),
    "one": Case(Sizes(1, 1, 64, 1, 192, down=True), interleave=True),
    "one, 64 tokens": Case(Sizes(40, 1, 64, 2, 128, down=True)),
    "one, 128 tokens": Case(Sizes(65, 1, 64, 67, 192), interleave=True),
}


def faults(case: Case) -> int:
    """Elements that are too far off."""
    arrays = query_oracle.random_arrays(case.sizes, case.dtype)
    project = functools.partial(
        _queries.absorbed_queries, interleave=case.interleave, implementation="cuda"
    )
    got = jax.jit(project)(query_oracle.operands(arrays))
    return query_oracle.faults(got, arrays, interleave=case.interleave)


def attention_operands(*, low_rank: bool) -> Operands:
    """Two requests of two new tokens, one of which has no place, and an empty request."""
    rng = np.random.default_rng(4)
    batch, s_q, heads, width, pages = 3, 2, 2, 64, 4

    def normal(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(jnp.bfloat16)

    angles = rng.uniform(-9, 9, (batch, s_q, 32))
    lengths = np.int32([70, 1, 0])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        schedule = get_mla_metadata(lengths, s_q * heads, 1, num_sm_parts=3)
    return Operands(
        source=normal(batch, s_q, width + 576 if low_rank else width),
        query_up=normal(width, heads, 192, size=width**-0.5),
        key_up=normal(heads, 128, 512, size=128**-0.5),
        side=normal(width) if low_rank else normal(width, 576, size=width**-0.5),
        latent_norm=normal(512),
        cos=np.float32(np.cos(angles)),
        sin=np.float32(np.sin(angles)),
        slots=np.int32([[2 * 64 + 4, 2 * 64 + 5], [-1, 64], [-1, -1]]),
        kv_cache=normal(pages, 64, 1, 576),
        block_table=np.int32([[3, 2], [1, -1], [-1, -1]]),
        cache_seqlens=lengths,
        tile_scheduler_metadata=np.asarray(schedule.tile_scheduler_metadata),
        num_splits=np.asarray(schedule.num_splits),
    )


def attention_faults(*, low_rank: bool) -> int:
    """Elements of the heads' results and of the pool that are too far from the host's."""
    operands = attention_operands(low_rank=low_rank)

    def attend(operands: Operands, *, implementation: str) -> tuple[jax.Array, jax.Array]:
        return absorbed_attention(operands, Static(0.05, 1e-6, True, implementation))

    run = jax.jit(attend, static_argnames="implementation")
    got = run(operands, implementation="cuda")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = run(operands, implementation="xla")
    pairs = [(np.float32(x), np.float32(y)) for x, y in zip(got, expected, strict=True)]
    return sum(int((~(np.abs(x - y) <= 2.0**-5 * (1 + np.abs(y)))).sum()) for x, y in pairs)


def main() -> int:
    checks = {name: functools.partial(faults, case) for name, case in CASES.items()}
    checks["attention"] = functools.partial(attention_faults, low_rank=False)
    checks["attention, low rank"] = functools.partial(attention_faults, low_rank=True)
    failed = False
    for name, count_faults in checks.items():
        wrong = count_faults()
        failed |= wrong > 0
        print(name, f"{wrong} wrong elements" if wrong else "ok", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
