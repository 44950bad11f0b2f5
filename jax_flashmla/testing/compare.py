"""Whether a result is good enough: FlashMLA's tolerances, and the error of an ideal kernel.

FlashMLA's tolerances alone are weak (with its nearly uniform softmax a plain mean of V passes all
element checks), so each row's error is also measured in units of the ideal kernel's error there.
"""

import dataclasses
from types import ModuleType

import numpy as np

from jax_flashmla.testing.truth import LOGIT_WORST, Array, Truth

# FlashMLA's.
OUT_ABS, OUT_REL = 8e-4, 2.01 / 128
LSE_ABS, LSE_REL = 1e-6, 8.01 / 65536
COSINE = 5e-6
# Ours: root mean square over many rows of (error / ideal error). Few rows get statistical room,
# IDEAL_FACTOR · (1 + 1/√rows): rounding errors of one row are not independent of each other.
IDEAL_FACTOR = 1.5
SMALLEST = 1e-9  # no error is measured in smaller units: rows that see nothing have no error


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is counted on the device; each field is [batch]."""

    misplaced: Array  # elements whose being NaN, +inf or −inf differs from the truth's
    out_beyond: Array  # elements of out beyond FlashMLA's tolerance
    lse_beyond: Array  # elements of lse beyond it
    squared_error: Array
    squared_size: Array  # of out and of the truth together
    squared_ratio: Array  # sum over rows of (error / ideal error)²
    worst_ratio: Array


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found, in words. Empty `faults` means the result passed."""

    faults: tuple[str, ...]
    ratio: float  # root mean square over the rows, 1 is the ideal kernel


def measure(xp: ModuleType, out: Array, lse: Array, truth: Truth) -> dict[str, Array]:
    """Fields of `Measured`, computed by `xp`: numpy, or jax.numpy with float64 switched on.

    Args:
        xp: the array namespace.
        out: [batch, s_q, h_q, 512], any float dtype.
        lse: [batch, s_q, h_q], −inf on empty rows.
        truth: the exact result.
    """
    out, lse = out.astype(xp.float64), lse.astype(xp.float64)
    misplaced = _differ(xp, out, truth.out).sum((1, 2, 3)) + _differ(xp, lse, truth.lse).sum((1, 2))
    finite = xp.isfinite(out) & xp.isfinite(truth.out)
    exact, got = xp.where(finite, truth.out, 0.0), xp.where(finite, out, 0.0)
    error, size = got - exact, xp.abs(exact)

    ideal = truth.ideal_error + _rms(xp, size) * (truth.float32 + truth.accumulation)
    ratio = _rms(xp, error) / xp.maximum(xp.where(xp.isfinite(ideal), ideal, 1.0), SMALLEST)

    finite_lse = xp.isfinite(lse) & xp.isfinite(truth.lse)
    true_lse = xp.where(finite_lse, truth.lse, 0.0)
    lse_error = xp.abs(xp.where(finite_lse, lse, 0.0) - true_lse)
    lse_room = xp.maximum(LSE_ABS, LSE_REL * xp.abs(true_lse))
    logit_error = LOGIT_WORST * xp.where(xp.isfinite(truth.float32), truth.float32, 0.0)
    out_room = xp.maximum(OUT_ABS, OUT_REL * size) + (logit_error * _rms(xp, size))[..., None]
    return {
        "misplaced": misplaced,
        "out_beyond": (xp.abs(error) > out_room).sum((1, 2, 3)),
        "lse_beyond": (lse_error > lse_room + logit_error).sum((1, 2)),
        "squared_error": (error**2).sum((1, 2, 3)),
        "squared_size": (got**2 + size**2).sum((1, 2, 3)),
        "squared_ratio": (ratio**2).sum((1, 2)),
        "worst_ratio": ratio.max((1, 2)),
    }


def judge(measured: Measured, rows: Array) -> Verdict:
    """Hold what was measured against every bound.

    Args:
        measured: host arrays.
        rows: int [batch]; rows of each request that attend to anything.
    """
    faults = [
        *_count("elements misplace NaN or inf", measured.misplaced),
        *_count("elements of out beyond FlashMLA's tolerance", measured.out_beyond),
        *_count("elements of lse beyond FlashMLA's tolerance", measured.lse_beyond),
    ]
    size = measured.squared_size.sum()
    cosine = float(measured.squared_error.sum() / size) if size else 0.0
    if cosine > COSINE:
        faults.append(f"cosine difference {cosine:.2e} > {COSINE}")
    whole = np.sqrt(measured.squared_ratio.sum() / max(rows.sum(), 1))
    if not whole <= _limit(rows.sum()):
        faults.append(f"error {whole:.2f} × the ideal kernel's > {_limit(rows.sum()):.2f}")
    each = np.sqrt(measured.squared_ratio / np.maximum(rows, 1))
    faults += _beyond("rows together", each, _limit(rows))
    faults += _beyond("one row", measured.worst_ratio, np.full(len(rows), _limit(1)))
    return Verdict(tuple(faults), float(whole))


def compare(out: np.ndarray, lse: np.ndarray, truth: Truth) -> Verdict:
    """`measure` and `judge` on the host; for small results."""
    measured = measure(np, np.asarray(out), np.asarray(lse), truth)
    return judge(Measured(**measured), (truth.tokens > 0).sum((1, 2)))


def _differ(xp: ModuleType, a: Array, b: Array) -> Array:
    return (
        (xp.isnan(a) != xp.isnan(b))
        | (xp.isposinf(a) != xp.isposinf(b))
        | (xp.isneginf(a) != xp.isneginf(b))
    )


def _rms(xp: ModuleType, x: Array) -> Array:
    return xp.sqrt(xp.mean(x**2, axis=-1))


def _limit(rows: Array) -> Array:
    return IDEAL_FACTOR * (1 + 1 / np.sqrt(np.maximum(rows, 1)))


def _count(what: str, counts: np.ndarray) -> list[str]:
    bad = np.flatnonzero(counts)
    return [f"{int(counts.sum())} {what}, requests {_some(bad)}"] if len(bad) else []


def _beyond(what: str, ratio: np.ndarray, limit: np.ndarray) -> list[str]:
    bad = np.flatnonzero(~(ratio <= limit))
    worst = f"{np.max(ratio):.2f} × the ideal kernel's error" if len(bad) else ""
    return [f"{what}: {worst}, requests {_some(bad)}"] if len(bad) else []


def _some(requests: np.ndarray) -> str:
    return ", ".join(map(str, requests[:8])) + (" …" if len(requests) > 8 else "")
