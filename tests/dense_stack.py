"""A small dense transformer around the MLA layer, and weights that make its errors visible.

What a model adds to attention and no more: embedding, norms, residuals, a gated MLP, logits. Its
tensors carry the names of a Hugging Face checkpoint, so that transformers can run the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import mla
from jax_flashmla.mla.weights import expected_shapes

INITIALIZER_RANGE = 0.06
NORM_SPREAD = 0.3  # norm weights are 1 + 0.3 randn
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}


def hf_config(model_type: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """A `config.json` of a small model without experts; fields override."""
    small = {
        "model_type": model_type,
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 48,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 163840,
    }
    return small | fields


class Layer(NamedTuple):
    """One layer's weights."""

    attention: mla.MLAWeights
    attention_norm: jax.Array  # [hidden]
    mlp_norm: jax.Array  # [hidden]
    gate: jax.Array  # [hidden, intermediate]
    up: jax.Array  # [hidden, intermediate]
    down: jax.Array  # [intermediate, hidden]


class Weights(NamedTuple):
    """The model's weights; those of the layers are stacked."""

    embedding: jax.Array  # [vocabulary, hidden]
    layers: Layer
    norm: jax.Array  # [hidden]
    head: jax.Array  # [vocabulary, hidden]

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return self.layers.attention_norm.shape[0]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    vocabulary = (config["vocab_size"], hidden)
    attention = expected_shapes(mla.MLAConfig.from_hf(config))
    shapes = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint in float32, the same on every machine."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        is_norm = "norm" in name
        tensors[name] = 1 + NORM_SPREAD * values if is_norm else INITIALIZER_RANGE * values
    return tensors


def load(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], dtype: jnp.dtype = jnp.float32
) -> Weights:
    """Takes a checkpoint apart."""

    def part(name: str) -> jax.Array:
        return jnp.asarray(tensors[f"{name}.weight"]).astype(dtype)

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        return Layer(
            mla.load_weights(
                tensors, mla.MLAConfig.from_hf(config), prefix=f"{prefix}.self_attn.", dtype=dtype
            ),
            part(f"{prefix}.input_layernorm"),
            part(f"{prefix}.post_attention_layernorm"),
            part(f"{prefix}.mlp.gate_proj").T,
            part(f"{prefix}.mlp.up_proj").T,
            part(f"{prefix}.mlp.down_proj").T,
        )

    layers = [layer(i) for i in range(config["num_hidden_layers"])]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    return Weights(part("model.embed_tokens"), stacked, part("model.norm"), part("lm_head"))


def forward(
    attend: Callable[..., tuple[jax.Array, jax.Array]],
    weights: Weights,
    config: mla.MLAConfig,
    tokens: jax.Array,
    pool: jax.Array,
    step: mla.Step,
    **options: Any,  # noqa: ANN401
) -> tuple[jax.Array, jax.Array]:
    """Runs the model: logits `[b, s_q, vocabulary]` of tokens int32 `[b, s_q]`, and the pool.

    `attend` is `mla.decode` or `mla.prefill`, `options` go there; the pool is one flat pool for all
    layers, scanned over.
    """
    num_pages = pool.shape[0] // weights.num_layers
    eps = config.rms_norm_eps

    def body(carry: tuple, numbered: tuple) -> tuple:
        (x, pool), (i, layer) = carry, numbered
        normed = mla.rms_norm(x, layer.attention_norm, eps)
        here = step.at_layer(i, num_pages)
        y, pool = attend(layer.attention, config, normed, pool, here, **options)
        x += y
        normed = mla.rms_norm(x, layer.mlp_norm, eps)
        inner = jax.nn.silu(normed @ layer.gate) * (normed @ layer.up)
        return (x + inner @ layer.down, pool), None

    numbers = jnp.arange(weights.num_layers, dtype=jnp.int32)
    start = weights.embedding[tokens], pool
    (x, pool), _ = jax.lax.scan(body, start, (numbers, weights.layers))
    logits = mla.rms_norm(x, weights.norm, eps) @ weights.head.T
    return logits, pool
