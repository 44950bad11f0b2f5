"""The correctness grid: 71 compiled shapes in named groups, and the cases swept over each.

Every head count, query length, batch and length that real models and servers produce is in some
shape; each shape meets every length pattern, logit distribution and page layout.
"""

from jax_flashmla.testing.cases import Case, Shape, sweep

CASES_PER_SHAPE = 30
H_Q = (1, 2, 3, 4, 5, 8, 9, 10, 12, 16, 20, 24, 32, 40, 48, 63, 64, 96, 126, 128)
DTYPES = ("bfloat16", "float16")
# DeepSeek-V3: (128 + 64) ** -0.5 · mscale², mscale = 0.1 · ln(40) + 1.
DEEPSEEK_SCALE = 192**-0.5 * 1.3688879454113936**2


def _heads() -> tuple[Shape, ...]:
    return tuple(
        Shape(8, 1, h_q, dtype=DTYPES[i % 2], causal=i % 3 != 0) for i, h_q in enumerate(H_Q)
    )


def _queries() -> tuple[Shape, ...]:
    """s_q and h_q; every second one without the causal mask, every third one float16."""
    pairs = (
        (2, 16), (2, 64), (2, 128), (3, 20), (3, 128), (4, 16), (4, 126), (5, 5), (5, 64),
        (8, 8), (8, 128), (16, 1), (16, 16), (16, 40),
    )  # fmt: skip
    shapes = [
        Shape(6, s_q, h_q, pages=20, dtype=DTYPES[i % 3 == 2], causal=i % 2 == 0)
        for i, (s_q, h_q) in enumerate(pairs)
    ]
    # Query blocks that a server sends down the decode path; the last has more row tiles than SMs.
    return (*shapes, Shape(2, 128, 16, pages=8), Shape(1, 128, 128, pages=4))


def _kv_heads() -> tuple[Shape, ...]:
    dims = ((1, 2, 2), (2, 16, 2), (4, 6, 3), (1, 24, 3), (1, 8, 8), (2, 64, 8), (3, 128, 8))
    return tuple(
        Shape(6, s_q, h_q, h_kv, pages=8, pool_pages=1024, dtype=DTYPES[i % 2], causal=i % 3 != 1)
        for i, (s_q, h_q, h_kv) in enumerate(dims)
    )


def _batches() -> tuple[Shape, ...]:
    return (
        Shape(1, 1, 128, pages=64),
        Shape(2, 1, 64, pages=64, dtype="float16"),
        Shape(32, 2, 128, pages=64),
        Shape(64, 1, 64, pages=64),
        Shape(128, 1, 16, pages=64),
        Shape(132, 1, 128, pages=64),
        Shape(133, 2, 20, pages=32, dtype="float16"),
        Shape(256, 1, 16, pages=32),
        Shape(512, 1, 8, pages=16),
        Shape(1024, 1, 16, pages=16),
        Shape(1024, 2, 128, pages=8),
    )


def _lengths() -> tuple[Shape, ...]:
    return (
        Shape(4, 1, 128, pages=128),
        Shape(2, 2, 16, pages=512),
        Shape(4, 1, 16, pages=2048),
        Shape(1, 1, 128, pages=2048),
        Shape(2, 4, 64, pages=2048, dtype="float16", causal=False),
    )


def _parts() -> tuple[Shape, ...]:
    counts = (1, 2, 3, 7, 16, 131, 132, 133, 264, 1000)
    few, many = Shape(6, 2, 64, pages=32), Shape(33, 1, 16, pages=32)
    return tuple(
        Shape(base.batch, base.s_q, base.h_q, pages=base.pages, num_sm_parts=count)
        for base, count in zip((few, many) * 5, counts, strict=True)
    )


def _models() -> tuple[Shape, ...]:
    return (
        Shape(32, 1, 128, pages=32, softmax_scale=DEEPSEEK_SCALE),
        Shape(32, 2, 16, pages=32, softmax_scale=DEEPSEEK_SCALE),
    )


GROUPS = {
    "heads": _heads(),
    "queries": _queries(),
    "kv_heads": _kv_heads(),
    "batches": _batches(),
    "lengths": _lengths(),
    "parts": _parts(),
    "models": _models(),
}


def swept(group: str) -> tuple[Case, ...]:
    """All cases of one group of shapes."""
    return tuple(case for shape in GROUPS[group] for case in sweep(shape, CASES_PER_SHAPE, group))
