"""The comparison can fail: it rejects known faults on named cases and accepts what is right."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_flashmla.testing import batches, cases, checking, compare, device_oracle, inputs, oracle
from jax_flashmla.testing.cases import PAGE_SIZE
from jax_flashmla.testing.truth import Truth

LN2 = np.float32(np.log(2))
SMALL = cases.small_cases()

# A fault and the cases that must show it: logits, or logits and lengths, of small cases.
REJECTED = {
    "mean_of_v": ("flashmla", "sigma1", "sigma5", "sigma30", "one_hot"),
    "last_page_dropped": ("flashmla", "sigma1", "sink", "falling", "offset-1e4"),
    "causal_one_short": ("flashmla", "sigma1", "rising", "offset-1e4"),
    "causal_one_long": ("flashmla", "sigma1", "rising", "offset-1e4"),
    "base_2_lse": ("flashmla", "sigma1", "magnitude1e4"),
    "not_rescaled": ("sigma1", "sigma5", "rising"),
}


@dataclasses.dataclass(frozen=True)
class Host:
    """A case's inputs as NumPy arrays; q joined."""

    q: np.ndarray
    kv_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens


def host(case: cases.Case) -> Host:
    q_latent, q_rope, *rest = map(np.asarray, inputs.make_inputs(case).arrays())
    return Host(np.concatenate([q_latent, q_rope], axis=-1), *rest)


def exact(case: cases.Case, data: Host) -> Truth:
    shape = case.shape
    return oracle.attend(*data.arrays(), softmax_scale=shape.softmax_scale, causal=shape.causal)


def kernel_arithmetic(
    case: cases.Case, data: Host, fault: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A page-by-page kernel in float32 with P rounded to the dtype, and optionally one fault."""
    shape, q = case.shape, data.q
    out = np.zeros((*q.shape[:3], cases.HEAD_DIM_V), np.float32)
    lse = np.full(q.shape[:3], -np.inf, np.float32)
    shift = {"causal_one_short": -1, "causal_one_long": 1}.get(fault, 0) * shape.causal
    for r, j, h in np.ndindex(*q.shape[:3]):
        back = shape.s_q - 1 - j if shape.causal else 0
        length = int(data.cache_seqlens[r])
        seen = min(length - back + shift, length)
        if fault == "last_page_dropped":
            seen = (seen - 1) // PAGE_SIZE * PAGE_SIZE
        if seen <= 0:
            continue
        pages = data.block_table[r, : -(-seen // PAGE_SIZE)]
        keys = data.kv_cache[pages, :, h // (shape.h_q // shape.h_kv)].astype(np.float32)
        keys = keys.reshape(-1, keys.shape[-1])[:seen]
        logits = keys @ q[r, j, h].astype(np.float32) * np.float32(shape.softmax_scale) / LN2
        out[r, j, h], lse[r, j, h] = _row(logits, keys, q.dtype, fault)
    return out.astype(q.dtype), lse


def _row(
    logits: np.ndarray, keys: np.ndarray, dtype: np.dtype, fault: str | None
) -> tuple[np.ndarray, np.float32]:
    top, total, sums = np.float32(-1e30), np.float32(0), np.zeros(cases.HEAD_DIM_V, np.float32)
    for page in range(0, len(logits), PAGE_SIZE):
        block = slice(page, page + PAGE_SIZE)
        new_top = max(top, logits[block].max())
        weights = np.exp2(logits[block] - new_top)
        decay = np.exp2(top - new_top)
        total = total * decay + weights.sum()
        if fault == "mean_of_v":
            weights = np.ones_like(weights)
        values = keys[block, : cases.HEAD_DIM_V]
        kept = np.float32(1) if fault in ("not_rescaled", "mean_of_v") else decay
        sums = sums * kept + weights.astype(dtype).astype(np.float32) @ values
        top = new_top
    lse = top + np.log2(total)
    total = np.float32(len(logits)) if fault == "mean_of_v" else total
    return sums / total, lse if fault == "base_2_lse" else lse * LN2


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_arithmetic_is_accepted(case: cases.Case) -> None:
    data = host(case)
    assert compare.compare(*kernel_arithmetic(case, data), exact(case, data)).faults == ()


@pytest.mark.parametrize(
    ("fault", "logits"), [(fault, logits) for fault, all_ in REJECTED.items() for logits in all_]
)
def test_fault_is_rejected(fault: str, logits: str) -> None:
    shape = cases.Shape(2, 2, 3, pages=5, pool_pages=16)
    case = cases.Case(shape, "ragged", logits, seed=3)
    data = host(case)
    verdict = compare.compare(*kernel_arithmetic(case, data, fault), exact(case, data))
    assert verdict.faults


def test_flashmla_tolerances_alone_accept_a_mean_of_v() -> None:
    """Why the bound by the ideal kernel exists."""
    case = cases.Case(cases.Shape(2, 2, 3, pages=5, pool_pages=16), "full", "flashmla")
    data = host(case)
    out, lse = kernel_arithmetic(case, data, "mean_of_v")
    measured = compare.measure(np, out, lse, exact(case, data))
    assert measured["out_beyond"].sum() == measured["lse_beyond"].sum() == 0
    assert compare.compare(out, lse, exact(case, data)).ratio > 2


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_portable_implementation_is_accepted(case: cases.Case) -> None:
    assert checking.check(case, "xla").faults == ()


@pytest.mark.parametrize("case", SMALL[:8], ids=lambda case: case.name)
def test_oracles_agree(case: cases.Case) -> None:
    data = host(case)
    shape = case.shape
    options = {"softmax_scale": shape.softmax_scale, "causal": shape.causal}
    streamed = device_oracle.attend(*map(jax.numpy.asarray, data.arrays()), **options)
    expected = exact(case, data)
    for field, rtol in {"out": 1e-9, "lse": 1e-12, "magnitude": 1e-9, "tokens": 0}.items():
        got = np.asarray(getattr(streamed, field))
        np.testing.assert_allclose(got, getattr(expected, field), rtol=rtol, atol=1e-15)
    # Its anchor is the running maximum of a chunk: the same rounding, not the same errors.
    ideal = np.asarray(streamed.ideal_error)
    np.testing.assert_allclose(ideal, expected.ideal_error, rtol=0.1, atol=1e-12)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_misplaced_non_finite_values_are_rejected(wrong: float) -> None:
    data = host(SMALL[0])
    truth = exact(SMALL[0], data)
    out, lse = kernel_arithmetic(SMALL[0], data)
    out[1, 0, 0, 7] = wrong
    assert "misplace" in compare.compare(out, lse, truth).faults[0]


def test_empty_rows_must_be_zero() -> None:
    case = cases.Case(SMALL[0].shape, "zeros")
    data = host(case)
    out, lse = kernel_arithmetic(case, data)
    assert compare.compare(out, lse, exact(case, data)).faults == ()
    out[0, 0, 0, 0] = 1e-4
    assert compare.compare(out, lse, exact(case, data)).faults


@pytest.mark.parametrize("table", cases.TABLES)
@pytest.mark.parametrize("lengths", cases.LENGTHS)
def test_data_is_poisoned_exactly_where_nothing_may_read(lengths: str, table: str) -> None:
    shape = cases.Shape(5, 3, 2, pages=4, pool_pages=23)
    data = host(cases.Case(shape, lengths, table=table, seed=1))
    assert data.cache_seqlens.min() >= 0
    assert data.cache_seqlens.max() <= shape.capacity
    readable = np.zeros((shape.pool_pages, PAGE_SIZE), bool)
    for row, length in zip(data.block_table, data.cache_seqlens, strict=True):
        used = -(-int(length) // PAGE_SIZE)
        assert np.all((row[:used] >= 0) & (row[:used] < shape.pool_pages))
        for token in range(length):
            readable[row[token // PAGE_SIZE], token % PAGE_SIZE] = True
    missing = np.isnan(data.kv_cache.astype(np.float32))
    assert np.array_equal(missing.all(axis=(2, 3)), ~readable)
    assert np.array_equal(missing.any(axis=(2, 3)), ~readable)


def test_tables_hold_garbage_beyond_the_length() -> None:
    shape = cases.Shape(64, 1, 1, pages=8, pool_pages=16)
    table = batches.make_batch(cases.Case(shape, "zeros")).block_table
    assert set(batches.GARBAGE_ENTRIES) | {shape.pool_pages} < set(table.flat)
    assert np.any((table >= 0) & (table < shape.pool_pages))


def test_a_case_always_gives_the_same_data() -> None:
    first, second = host(SMALL[2]), host(SMALL[2])
    for a, b in zip(first.arrays(), second.arrays(), strict=True):
        assert a.tobytes() == b.tobytes()


def test_names_are_unique_and_find_their_case() -> None:
    swept = cases.sweep(SMALL[0].shape, 60)
    assert {case.lengths for case in swept} == set(cases.LENGTHS) == set(batches.LENGTH_PATTERNS)
    assert {case.logits for case in swept} == set(cases.LOGITS)
    assert all(cases.named(SMALL, case.name) is case for case in SMALL)
    with pytest.raises(KeyError, match="0 cases"):
        cases.named(SMALL, "none")
