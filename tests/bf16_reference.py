"""The models, tokens and recorded logits that the kernel's bfloat16 is judged by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dense_stack
import jax.numpy as jnp
import numpy as np

PATH = Path(__file__).parent / "data" / "bf16_reference.npz"
CONFIGS = {
    "v2": dense_stack.hf_config("deepseek_v2", q_lora_rank=None),
    "v3-yarn": dense_stack.hf_config(
        "deepseek_v3",
        num_attention_heads=16,
        num_key_value_heads=16,
        rope_scaling=dense_stack.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}
LENGTHS = {"a": 150, "b": 70, "c": 21}
DECODED = 20  # of each request's tokens; those before are prefilled


def tokens(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Each request's tokens."""
    rng = np.random.default_rng(11)
    return {name: rng.integers(0, config["vocab_size"], n) for name, n in LENGTHS.items()}


def rounded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in float32, rounded to bfloat16."""
    return {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in tensors.items()}


def key(model: str, request: str, dtype: str) -> str:
    """The name of an array in the file."""
    return f"{model}/{request}/{dtype}"


def error(got: Mapping[str, np.ndarray], model: str, recorded: Mapping[str, np.ndarray]) -> float:
    """Root mean square of the differences to the float32 reference, over all requests' logits."""
    differences = [x - recorded[key(model, name, "float32")] for name, x in got.items()]
    return float(np.sqrt(np.mean(np.square(np.concatenate(differences)))))
