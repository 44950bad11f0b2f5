"""The weights of one MLA layer, from the tensors of a Hugging Face checkpoint."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_flashmla.mla.config import MLAConfig

_FLOATS = ("bfloat16", "float16", "float32")


class WeightsError(ValueError):
    """Tensors are missing, unexpected, or have another shape or dtype; nothing was made."""


class MLAWeights(NamedTuple):
    """One layer's weights, each laid out as its product reads it: contracted dimensions first.

    To shard by heads, split `query_up`, `key_up`, `value_up` and `output` along h_q and keep the
    rest whole.

    Attributes:
        down: `[hidden, q_lora_rank + 576]`, q_a_proj beside kv_a_proj_with_mqa, so that one product
            reads x; `[hidden, 576]` without q_lora_rank.
        down_bias: `[q_lora_rank + 576]` (zeros where a part has none), or None.
        query_norm: `[q_lora_rank]`, or None.
        query_up: `[q_lora_rank, h_q, qk_head_dim]`, or `[hidden, h_q, qk_head_dim]`.
        latent_norm: `[512]`.
        key_up: W_UK `[h_q, qk_nope_head_dim, 512]`, the keys' part of kv_b_proj.
        value_up: W_UV `[h_q, 512, v_head_dim]`, the values' part of kv_b_proj.
        output: `[h_q, v_head_dim, hidden]`.
        output_bias: `[hidden]`, or None.
    """

    down: jax.Array
    down_bias: jax.Array | None
    query_norm: jax.Array | None
    query_up: jax.Array
    latent_norm: jax.Array
    key_up: jax.Array
    value_up: jax.Array
    output: jax.Array
    output_bias: jax.Array | None


def load_weights(
    tensors: Mapping[str, jax.Array | np.ndarray],
    config: MLAConfig,
    *,
    prefix: str = "",
    dtype: DTypeLike | None = None,
) -> MLAWeights:
    """Takes one layer's attention tensors out of a checkpoint and factors kv_b_proj.

    Args:
        tensors: by name, JAX or NumPy arrays in bfloat16, float16 or float32 (a float8 checkpoint
            has to be dequantised before).
        config: of the model.
        prefix: of the names, such as "model.layers.3.self_attn."; names without it are ignored.
        dtype: of the result; None keeps the tensors' own.

    Raises:
        WeightsError: tensors under the prefix are missing, not known or misshapen, or their dtype
            is no float of 16 or 32 bits. The message names all of them; no array is made before.
    """
    given = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
    _check(given, expected_shapes(config), prefix)

    def part(name: str) -> jax.Array:
        array = jnp.asarray(given[name])
        return array if dtype is None else array.astype(dtype)

    def optional(name: str) -> jax.Array | None:
        return part(name) if name in given else None

    heads, nope, v_dim = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    with_lora = config.q_lora_rank is not None
    downs = [part("q_a_proj.weight")] if with_lora else []
    downs.append(part("kv_a_proj_with_mqa.weight"))
    biases = [name for name in ("q_a_proj.bias", "kv_a_proj_with_mqa.bias") if name in given]
    query_up = part("q_b_proj.weight" if with_lora else "q_proj.weight")
    key_value_up = part("kv_b_proj.weight").reshape(heads, nope + v_dim, config.kv_lora_rank)
    return MLAWeights(
        down=jnp.concatenate(downs).T,
        down_bias=jnp.concatenate([part(name) for name in biases]) if biases else None,
        query_norm=optional("q_a_layernorm.weight"),
        query_up=query_up.T.reshape(-1, heads, config.qk_head_dim),
        latent_norm=part("kv_a_layernorm.weight"),
        key_up=key_value_up[:, :nope],
        value_up=key_value_up[:, nope:].transpose(0, 2, 1),
        output=part("o_proj.weight").T.reshape(heads, v_dim, config.hidden_size),
        output_bias=optional("o_proj.bias"),
    )


def expected_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's tensors in a checkpoint; a projection is [out, in]."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries, cached = heads * config.qk_head_dim, rank + config.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (cached, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
    }
    biases = {"kv_a_proj_with_mqa.bias": (cached,), "o_proj.bias": (hidden,)}
    if config.q_lora_rank is None:
        shapes["q_proj.weight"] = (queries, hidden)
    else:
        shapes["q_a_proj.weight"] = (config.q_lora_rank, hidden)
        shapes["q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["q_b_proj.weight"] = (queries, config.q_lora_rank)
        biases["q_a_proj.bias"] = (config.q_lora_rank,)
    return shapes | biases if config.attention_bias else shapes


def _check(
    given: Mapping[str, jax.Array | np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    prefix: str,
) -> None:
    wrong = []
    for name, shape in expected.items():
        if name not in given:
            wrong.append(f"{prefix}{name}: got none, expected {list(shape)}")
        elif tuple(given[name].shape) != shape:
            got = list(given[name].shape)
            wrong.append(f"{prefix}{name}: got shape {got}, expected {list(shape)}")
        elif str(given[name].dtype) not in _FLOATS:
            dtype = given[name].dtype
            wrong.append(f"{prefix}{name}: got {dtype}, expected {', '.join(_FLOATS)}")
    # A buffer of old checkpoints, which follows from the config.
    unknown = set(given) - set(expected) - {"rotary_emb.inv_freq"}
    wrong += [f"{prefix}{name}: got a tensor that this layer has not" for name in sorted(unknown)]
    if wrong:
        raise WeightsError("; ".join(wrong))
