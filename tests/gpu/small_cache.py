"""A few cache operations and merges on the GPU, checked on the host; for compute-sanitizer."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jax_flashmla import _exchange, cache, merge_partials
from jax_flashmla.testing import cache_oracle
from jax_flashmla.testing.cache_oracle import bits, random_bits

PAGES, ROWS = 3, 7
SLOTS = np.int32([0, -1, PAGES * 64 - 1, PAGES * 64, 70, 2**31 - 1, -(2**31)])


def append_faults() -> int:
    """Elements of the pool that are wrong after plain and rotated appends."""
    rng = np.random.default_rng(0)
    shapes = (PAGES, 64, 1, 576), (ROWS, 512), (ROWS, 64)
    pool, latent, rope = (random_bits(rng, *s, dtype="bfloat16", payloads=True) for s in shapes)
    run = jax.jit(cache.append, static_argnames=("rope_interleave", "implementation"))
    got = run(pool, latent, rope, SLOTS, implementation="cuda")
    rows = np.concatenate([latent, rope], axis=1)
    faults = int((bits(got) != bits(cache_oracle.append(pool, rows, SLOTS))).sum())
    still = {"cos": np.ones((ROWS, 32), np.float32), "sin": np.zeros((ROWS, 32), np.float32)}
    whole = np.arange(64, dtype=np.float32) * np.ones((ROWS, 1), np.float32)
    rope = whole.astype(rope.dtype)
    for interleave in (False, True):
        turned = np.concatenate([rope[:, 0::2], rope[:, 1::2]], axis=1) if interleave else rope
        rows = np.concatenate([latent, turned], axis=1)
        options = {"rope_interleave": interleave, "implementation": "cuda"}
        got = run(pool, latent, rope, SLOTS, **still, **options)
        faults += int((bits(got) != bits(cache_oracle.append(pool, rows, SLOTS))).sum())
    return faults


def projected_faults() -> int:
    """Elements of the pool that are wrong after appends of projected rows."""
    rng = np.random.default_rng(3)
    angles = rng.uniform(-9, 9, (ROWS, 32))
    run = jax.jit(
        cache.append_projected, static_argnames=("norm_eps", "rope_interleave", "implementation")
    )
    faults = 0
    for dtype in (jnp.bfloat16, jnp.float16):
        arrays = {
            "cache": rng.standard_normal((PAGES, 64, 1, 576)).astype(dtype),
            "projected": rng.standard_normal((ROWS, 600)).astype(dtype),
            "latent_norm": rng.standard_normal(512).astype(dtype),
            "slots": SLOTS,
            "cos": np.float32(np.cos(angles)),
            "sin": np.float32(np.sin(angles)),
        }
        for interleave in (False, True):
            got = run(**arrays, norm_eps=1e-5, rope_interleave=interleave, implementation="cuda")
            faults += cache_oracle.projected_faults(got, arrays, eps=1e-5, interleave=interleave)
    return faults


def gather_faults() -> int:
    """Elements that are wrong for odd lengths and tables, with one and with three KV heads."""
    rng = np.random.default_rng(1)
    table = np.int32([[0, 2], [1, -1], [3, 0], [2147480000, 2]])
    lengths = np.int32([128, 70, 65, 0])
    faults = 0
    for h_kv in (1, 3):
        pool = random_bits(rng, PAGES, 64, h_kv, 576, dtype="float16", payloads=True)
        got = jax.jit(cache.gather, static_argnames="implementation")(
            pool, table, lengths, implementation="cuda"
        )
        faults += int((bits(got) != bits(cache_oracle.gather(pool, table, lengths))).sum())
    return faults


def merge_faults() -> int:
    """Elements that are too far off, for every team size."""
    rng = np.random.default_rng(2)
    faults = 0
    for n, rows, d in ((2, 3, 24), (7, 5, 512), (12, 3, 72), (40, 2, 512)):
        outs = rng.standard_normal((n, rows, d)).astype(np.float32)
        lses = rng.standard_normal((n, rows)).astype(np.float32)
        outs[0, 0], lses[0, 0] = np.nan, -np.inf
        merged = jax.jit(merge_partials, static_argnames="implementation")(
            outs, lses, implementation="cuda"
        )
        expected = cache_oracle.merge(outs, lses, "float32")
        faults += sum(e.faults(np.asarray(x)) for e, x in zip(expected, merged, strict=True))
    return faults


def exchange_faults() -> int:
    """Elements that are too far off, of three exchanges with no other device than this one.

    All operands come from the host: of what XLA's kernels write, the sanitizer knows nothing.
    """
    rng = np.random.default_rng(3)
    outs = rng.standard_normal((3, 19, 512)).astype(np.float16)
    lses = rng.standard_normal((3, 3, 19)).astype(np.float32)
    outs[0, 0], lses[:, 0, 0] = np.nan, -np.inf
    options = {"axis_name": "devices", "exchange": "direct", "implementation": "cuda"}

    def three(outs: jax.Array, *lses: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        return [_exchange.merge_over(outs, x, **options) for x in lses]

    mesh = jax.make_mesh((1,), ("devices",))
    merged = jax.jit(jax.shard_map(three, mesh=mesh, in_specs=P(), out_specs=P()))(outs, *lses)
    faults = 0
    for x, pair in zip(lses, merged, strict=True):
        expected = cache_oracle.merge(outs, x, "float16")
        faults += sum(e.faults(np.asarray(x)) for e, x in zip(expected, pair, strict=True))
    return faults


def main() -> int:
    found = {
        "append": append_faults(),
        "append_projected": projected_faults(),
        "gather": gather_faults(),
        "merge": merge_faults(),
        "exchange": exchange_faults(),
    }
    for name, faults in found.items():
        print(name, f"{faults} wrong elements" if faults else "ok")
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main())
