"""The oracle on the host: attention as a NumPy loop in float64, request by request, head by head.

Slow and obvious on purpose. `device_oracle` gives the same numbers for large cases.
"""

import math

import numpy as np

from jax_flashmla.testing import truth
from jax_flashmla.testing.cases import HEAD_DIM_V, PAGE_SIZE


def attend(
    q: np.ndarray,
    kv_cache: np.ndarray,
    block_table: np.ndarray,
    cache_seqlens: np.ndarray,
    *,
    softmax_scale: float,
    causal: bool,
) -> truth.Truth:
    """Exact paged attention of every row.

    Args:
        q: [batch, s_q, h_q, 576], of the dtype whose ideal kernel is modelled.
        kv_cache: [num_pages, 64, h_kv, 576].
        block_table: int32 [batch, pages].
        cache_seqlens: int32 [batch].
        softmax_scale: factor on q · k.
        causal: query j of s_q sees keys k < seqlen − (s_q − 1 − j).

    Returns:
        The truth of each row, in float64.
    """
    batch, s_q, h_q, _ = q.shape
    group = h_q // kv_cache.shape[2]
    out = np.zeros((batch, s_q, h_q, HEAD_DIM_V))
    lse = np.full((batch, s_q, h_q), -np.inf)
    ideal_error, magnitude, tokens = np.zeros((3, batch, s_q, h_q))
    for r, j, h in np.ndindex(batch, s_q, h_q):
        seen = int(cache_seqlens[r]) - (s_q - 1 - j if causal else 0)
        if seen <= 0:
            continue
        pages = block_table[r, : -(-seen // PAGE_SIZE)]
        keys = kv_cache[pages, :, h // group].reshape(-1, kv_cache.shape[-1])[:seen]
        row = _attend_row(q[r, j, h].astype(np.float64), keys.astype(np.float64), softmax_scale)
        logits, out[r, j, h], lse[r, j, h], sizes = row
        ideal_error[r, j, h] = _ideal_error(logits, keys, out[r, j, h], q.dtype)
        magnitude[r, j, h], tokens[r, j, h] = sizes, seen
    return truth.Truth(out, lse, ideal_error, magnitude, tokens)


def _attend_row(
    q: np.ndarray, keys: np.ndarray, softmax_scale: float
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Logits [tokens], output [512], lse and logit magnitude of one row over keys [tokens, 576]."""
    logits = softmax_scale * (keys @ q)
    top = logits.max()
    lse = top + math.log(np.exp(logits - top).sum())
    out = np.exp(logits - lse) @ keys[:, :HEAD_DIM_V]
    norms = np.linalg.norm(q) * np.linalg.norm(keys, axis=1).max()
    magnitude = max(np.abs(logits).max(), softmax_scale * norms / math.sqrt(q.size))
    return logits, out, lse, magnitude


def _ideal_error(logits: np.ndarray, keys: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> float:
    """Root mean square error of the ideal kernel on one row."""
    weights = np.exp(logits - logits.max())
    values = keys[:, :HEAD_DIM_V].astype(np.float64)
    squares = []
    for anchor in truth.ANCHORS:
        rounded = (weights * 2.0**anchor).astype(dtype).astype(np.float64)
        out = rounded @ values / (weights.sum() * 2.0**anchor)
        error = out.astype(dtype).astype(np.float64) - exact
        squares.append(np.mean(error**2))
    return math.sqrt(np.mean(squares))
