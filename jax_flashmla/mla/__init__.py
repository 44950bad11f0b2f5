"""Multi-head latent attention as a layer: absorbed projections around `mla_decode`.

README.md in this folder explains it; `jax_flashmla.mla.nnx` is the same as Flax NNX modules,
`jax_flashmla.mla.context` over a mesh axis.
"""

from jax_flashmla.mla.config import ConfigError, MLAConfig, Yarn
from jax_flashmla.mla.layer import decode, rms_norm
from jax_flashmla.mla.prefill import prefill
from jax_flashmla.mla.queries import absorbed_queries
from jax_flashmla.mla.rope_table import cos_sin
from jax_flashmla.mla.step import Step, decode_step, prefill_step
from jax_flashmla.mla.weights import MLAWeights, WeightsError, expected_shapes, load_weights

__all__ = [
    "ConfigError",
    "MLAConfig",
    "MLAWeights",
    "Step",
    "WeightsError",
    "Yarn",
    "absorbed_queries",
    "cos_sin",
    "decode",
    "decode_step",
    "expected_shapes",
    "load_weights",
    "prefill",
    "prefill_step",
    "rms_norm",
]
