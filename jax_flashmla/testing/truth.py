"""What a result is held against: the exact attention, and the error an ideal kernel would make.

The ideal kernel computes in float64 and rounds only the probabilities P and the output O to the
dtype. P is rounded relative to an anchor of the kernel's choice (its running maximum, somewhere
above or below the final one), so its error is the mean over several anchors: a kernel is not held
to the luck of one of them.

Float32 enters a real kernel in two places that no choice of rounding avoids: a logit of magnitude
M is known to M · `LOGIT_EPS`, which moves P and lse by as much, and the output accumulator rounds
at each of its n/16 steps. `Truth.float32` carries the first, `Truth.accumulation` the second.
`LOGIT_EPS` is the typical error, `LOGIT_WORST` times it the worst: of 131,072 logits of one key,
the tensor cores of an H200 missed the exact one by 0.65 (bfloat16) to 0.94 (float16) · 2^-21 · M on
average and by 5.5 · 2^-21 · M at most, at every scale of the queries tried (1, 5, 30).
"""

import dataclasses
import functools
from typing import Any

import jax

# Anchors of P in powers of two.
ANCHORS = (0.0, -0.5)
LOGIT_EPS = 2.0**-21
LOGIT_WORST = 8.0
STEP_EPS = 2.0**-24
TOKENS_PER_STEP = 16

Array = Any  # np.ndarray on the host, jax.Array on the device


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("out", "lse", "ideal_error", "magnitude", "tokens"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Truth:
    """Exact results and error scales; all float64.

    Attributes:
        out: [batch, s_q, h_q, 512].
        lse: [batch, s_q, h_q], natural log, −inf on empty rows.
        ideal_error: [batch, s_q, h_q], root mean square over the row of the ideal kernel's error.
        magnitude: [batch, s_q, h_q], size of the products that a logit is summed from: the larger
            of max |logit| and softmax_scale · |q| · max |k| / 24.
        tokens: [batch, s_q, h_q], keys the row attends to.
    """

    out: Array
    lse: Array
    ideal_error: Array
    magnitude: Array
    tokens: Array

    @property
    def float32(self) -> Array:
        """[batch, s_q, h_q]; what float32 logits do to lse, and relatively to P."""
        return self.magnitude * LOGIT_EPS

    @property
    def accumulation(self) -> Array:
        """[batch, s_q, h_q]; relative error of summing O in float32, one key block at a time."""
        return self.tokens * (STEP_EPS / TOKENS_PER_STEP)
