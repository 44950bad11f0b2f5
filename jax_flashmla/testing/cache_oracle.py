"""The cache operations by loops in NumPy: moves of bits, and float64 where there is arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # half a last place of 1
TINY = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}
FLOAT32_ROUNDINGS = 8  # of a kernel's float32 arithmetic, each relative to the terms it sums


@dataclasses.dataclass(frozen=True)
class Exact:
    """An exact result, and how far a computation in float32, rounded once, may be off it.

    Attributes:
        values: float64.
        room: float64 of the same shape.
    """

    values: np.ndarray
    room: np.ndarray

    def faults(self, got: np.ndarray) -> int:
        """How many elements are further off than that, or NaN where they should not be."""
        wide = np.asarray(got, np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf
            near = np.abs(wide - self.values) <= self.room
        return int((~near & (wide != self.values)).sum())


def exact(values: np.ndarray, terms: np.ndarray, dtype: str) -> Exact:
    """Allows half a last place of `dtype` and float32's errors on terms of a magnitude."""
    size = np.where(np.isinf(values), 0.0, np.abs(values))
    float32 = FLOAT32_ROUNDINGS * UNIT["float32"] * terms
    return Exact(values, UNIT[dtype] * (size + float32) + float32 + TINY[dtype])


def bits(array: jax.Array | np.ndarray) -> np.ndarray:
    """An array's elements as unsigned integers, for comparisons that NaN does not disturb."""
    host = np.ascontiguousarray(array)
    return host.view(np.uint16 if host.dtype.itemsize == 2 else np.uint32)


def random_bits(
    rng: np.random.Generator, *shape: int, dtype: str, payloads: bool = False
) -> np.ndarray:
    """Every kind of number; NaN with any payload, or only one as XLA's CPU backend keeps it."""
    kind = np.uint32 if dtype == "float32" else np.uint16
    values = rng.integers(0, np.iinfo(kind).max, shape, kind).view(jnp.dtype(dtype))
    if payloads:
        return values
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(values), np.asarray(jnp.nan, values.dtype), values)


def append(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Writes whole rows `[n, 576]` into a copy of the pool `[num_pages, 64, 1, 576]`."""
    written = cache.copy()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if 0 <= slot < cache.shape[0] * 64:
            written[slot // 64, slot % 64, 0] = row
    return written


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleave: bool) -> Exact:
    """Rotates `[..., 64]`, as complex numbers."""
    wide = x.astype(np.float64)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleave else np.split(wide, 2, -1)
    turned = (first + 1j * second) * (cos.astype(np.float64) + 1j * sin.astype(np.float64))
    terms = np.abs(first) + np.abs(second)
    terms = np.tile(terms * np.maximum(np.abs(cos), np.abs(sin)), 2)
    return exact(np.concatenate([turned.real, turned.imag], axis=-1), terms, str(x.dtype))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Exact:
    """Norms `[..., d]`; a sum of d squares is allowed as many roundings again as a product."""
    wide = x.astype(np.float64)
    scale = 1 / np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + eps)
    values = wide * scale * weight.astype(np.float64)
    return exact(values, 2 * np.abs(values), str(x.dtype))


def projected_faults(
    got: jax.Array | np.ndarray,
    arrays: dict[str, np.ndarray],
    *,
    eps: float,
    interleave: bool,
) -> int:
    """How many elements of a pool are wrong behind an `append_projected` of these arrays."""
    slots, pool = arrays["slots"], np.asarray(arrays["cache"])
    written = np.flatnonzero((slots >= 0) & (slots < len(pool) * 64))
    latent, key = np.split(np.asarray(arrays["projected"])[written, -576:], [512], axis=-1)
    cos, sin = arrays["cos"][written], arrays["sin"][written]
    tokens = np.array(got).reshape(-1, 576)
    rows = tokens[slots[written]]
    faults = rms_norm(latent, np.asarray(arrays["latent_norm"]), eps).faults(rows[:, :512])
    faults += rotate(key, cos, sin, interleave=interleave).faults(rows[:, 512:])
    tokens[slots[written]] = pool.reshape(-1, 576)[slots[written]]  # the others are untouched
    return faults + int((bits(tokens) != bits(pool.reshape(-1, 576))).sum())


def gather(cache: np.ndarray, block_table: np.ndarray, cache_seqlens: np.ndarray) -> np.ndarray:
    """Copies token by token, `[b, max_pages_per_seq * 64, h_kv, 576]`."""
    batch, width = block_table.shape
    found = np.zeros((batch, width * 64, *cache.shape[2:]), cache.dtype)
    for request in range(batch):
        for page in range(width):
            index = int(block_table[request, page])
            tokens = min(64, int(cache_seqlens[request]) - 64 * page)
            if tokens > 0 and 0 <= index < cache.shape[0]:
                found[request, 64 * page : 64 * page + tokens] = cache[index, :tokens]
    return found


def merge(outs: np.ndarray, lses: np.ndarray, dtype: str) -> tuple[Exact, Exact]:
    """Merges `[n, rows, d]` and `[n, rows]` row by row: out and lse."""
    rows, d = outs.shape[1:]
    out, terms = np.zeros((rows, d)), np.zeros((rows, d))
    lse, spread = np.full(rows, -np.inf), np.zeros(rows)
    for row in range(rows):
        kept = [k for k in range(len(lses)) if lses[k, row] != -np.inf]
        if not kept:
            continue
        logs, parts = lses[kept, row].astype(np.float64), outs[kept, row].astype(np.float64)
        weights = np.exp(logs - logs.max())
        out[row] = weights @ parts / weights.sum()
        # An error of float32 in lse - max moves a weight by as much, so by at most ~ 1 / weight.
        off = 1 + np.minimum(np.abs(logs - logs.max()), 104)
        terms[row] = (weights * off) @ np.abs(parts) / weights.sum() * (1 + len(kept) / 8)
        lse[row] = logs.max() + np.log(weights.sum())
        spread[row] = np.abs(logs).max() + np.log(len(kept)) + 1
    return exact(out, terms, dtype), exact(lse, spread, "float32")
