"""Checkpoint tensors to factored weights: what goes where, and what is refused."""

from typing import Any

import dense_stack
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import mla
from jax_flashmla.mla.weights import expected_shapes

PREFIX = "model.layers.0.self_attn."
HF = dense_stack.hf_config("deepseek_v3", num_hidden_layers=1, attention_bias=True)
CONFIG = mla.MLAConfig.from_hf(HF)


def tensors(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """A checkpoint with some attention tensors changed; None takes one away."""
    named = {f"{PREFIX}{name.replace('__', '.')}": value for name, value in changes.items()}
    given = dense_stack.random_tensors(HF) | named
    return {name: value for name, value in given.items() if value is not None}


def test_factors_reproduce_the_projection() -> None:
    given = tensors()
    weights = mla.load_weights(given, CONFIG, prefix=PREFIX)
    latent = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    both = (given[f"{PREFIX}kv_b_proj.weight"] @ latent).reshape(4, 32 + 48)
    np.testing.assert_allclose(weights.key_up @ latent, both[:, :32], rtol=1e-5, atol=1e-5)
    values = jnp.einsum("c,hcv->hv", latent, weights.value_up)
    np.testing.assert_allclose(values, both[:, 32:], rtol=1e-5, atol=1e-5)


def test_shapes_with_and_without_query_bottleneck() -> None:
    weights = mla.load_weights(tensors(), CONFIG, prefix=PREFIX)
    assert weights.down.shape == (256, 96 + 576)
    assert weights.query_up.shape == (96, 4, 96)
    assert weights.output.shape == (4, 48, 256)
    hf = HF | {"q_lora_rank": None, "attention_bias": False}
    config = mla.MLAConfig.from_hf(hf)
    weights = mla.load_weights(dense_stack.random_tensors(hf), config, prefix=PREFIX)
    assert (weights.down.shape, weights.query_up.shape) == ((256, 576), (256, 4, 96))
    assert (weights.query_norm, weights.down_bias, weights.output_bias) == (None, None, None)


def test_bias_of_the_cache_alone_without_query_bottleneck() -> None:
    hf = HF | {"q_lora_rank": None}
    config = mla.MLAConfig.from_hf(hf)
    weights = mla.load_weights(dense_stack.random_tensors(hf), config, prefix=PREFIX)
    assert weights.down_bias.shape == (576,)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtype_is_kept_or_changed(dtype: Any) -> None:  # noqa: ANN401
    weights = mla.load_weights(tensors(), CONFIG, prefix=PREFIX, dtype=dtype)
    assert {x.dtype for x in weights} == {jnp.dtype(dtype or jnp.float32)}


def test_old_frequency_buffers_are_ignored() -> None:
    mla.load_weights(tensors(rotary_emb__inv_freq=np.zeros(32)), CONFIG, prefix=PREFIX)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kv_b_proj__weight": None}, "kv_b_proj.weight: got none, expected [320, 512]"),
        ({"o_proj__bias": None}, "o_proj.bias: got none, expected [256]"),
        (
            {"q_b_proj__weight": np.zeros((96, 384), np.float32)},
            "q_b_proj.weight: got shape [96, 384], expected [384, 96]",
        ),
        (
            {"kv_a_layernorm__weight": np.zeros(512, np.int8)},
            "kv_a_layernorm.weight: got int8, expected bfloat16, float16, float32",
        ),
        (
            {"q_a_proj__weight": jnp.zeros((96, 256), jnp.float8_e4m3fn)},
            "q_a_proj.weight: got float8_e4m3fn",
        ),
        (
            {"indexer__wk__weight": np.zeros((128, 256), np.float32)},
            "indexer.wk.weight: got a tensor that this layer has not",
        ),
    ],
    ids=["missing", "missing bias", "transposed", "integers", "float8", "unknown"],
)
def test_wrong_tensors_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(mla.WeightsError) as error:
        mla.load_weights(tensors(**changes), CONFIG, prefix=PREFIX)
    assert f"{PREFIX}{text}" in str(error.value)


def test_all_wrong_tensors_are_named_at_once() -> None:
    with pytest.raises(mla.WeightsError) as error:
        mla.load_weights({}, CONFIG, prefix="nowhere.")
    assert all(f"nowhere.{name}: got none" in str(error.value) for name in expected_shapes(CONFIG))
