"""How the logits of a case are distributed.

Keys are drawn as FlashMLA's tests draw them, randn/10, so that values have the size its absolute
tolerance was made for; the width of the logits comes from the queries. What depends on the
position in a request (a sink, one hot key, a rising row maximum) is a `boost` in logits, written
along one fixed direction of the RoPE part: the values are not touched by it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

KEY_SIGMA = 0.1
# Queries carry BOOST_QUERY · (±1 pattern) in their RoPE part when a recipe has a boost.
BOOST_QUERY = 30.0

Boost = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LogitRecipe:
    """Standard deviations of the drawn parts, and the boost of a slot in logits.

    Attributes:
        q_latent: of q_latent; a logit gets 22.6 · 0.1 · q_latent · softmax_scale of it.
        q_rope: of q_rope.
        k_rope: of the RoPE part of the keys.
        boost: (position [pool_pages, page_size], longest, rng) → logits added per slot.
    """

    q_latent: float
    q_rope: float
    k_rope: float = KEY_SIGMA
    boost: Boost | None = None


def _sigma(sigma: float, boost: Boost | None = None) -> LogitRecipe:
    return LogitRecipe(10 * sigma, 10 * sigma, boost=boost)


def _peaked(position: np.ndarray, _: int, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(position.shape) < 1 / 128, 6.0, 0.0)


def _sink(position: np.ndarray, longest: int, _: np.random.Generator) -> np.ndarray:
    return np.where(position < 2, np.log(longest + 1.0), 0.0)


def _one_hot(position: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    return np.where(position == rng.integers(max(longest, 1)), 80.0, 0.0)


def _rising(position: np.ndarray, longest: int, _: np.random.Generator) -> np.ndarray:
    """Every key beats the ones before it: the row maximum moves on every page."""
    return np.maximum(position, 0) * max(80.0 / (longest + 1), 0.05)


RECIPES: dict[str, LogitRecipe] = {
    "flashmla": _sigma(0.01),  # its tests: queries randn/10 too, so softmax is nearly uniform
    "sigma1": _sigma(1.0),
    "sigma5": _sigma(5.0),
    "sigma30": _sigma(30.0),
    "peaked": _sigma(1.0, _peaked),
    "sink": _sigma(1.0, _sink),
    "one_hot": _sigma(1.0, _one_hot),
    "rising": _sigma(1.0, _rising),
    "falling": _sigma(1.0, lambda *args: -_rising(*args)),
    # 1e4 by a RoPE part of its own size, so that the values keep theirs and float16 its range.
    "magnitude1e4": LogitRecipe(1e4, 3e3, k_rope=10.0),
    # All logits near −1e4: a mask or a running maximum with a small sentinel loses here.
    "offset-1e4": _sigma(1.0, lambda position, *_: np.full(position.shape, -1e4)),
}
