"""One attention module of transformers, and its constants, against the layer here."""

from typing import Any

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from model_configs import RELEASED
from reference_model import torch, transformers
from test_judge_stack import BOUND, CONFIGS

from jax_flashmla import cache, mla
from jax_flashmla.mla.rope_table import inverse_frequencies
from jax_flashmla.pages import PagePool


def causal(n: int) -> "torch.Tensor":
    return torch.full((n, n), float("-inf")).triu(1)[None, None]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_attention_module(config: dict[str, Any]) -> None:
    """The module's result itself, before a residual hides its errors: prefill, then two tokens."""
    tensors = dense_stack.random_tensors(config)
    model = reference_model.build(config, tensors).model
    x = np.random.default_rng(5).standard_normal((1, 100, config["hidden_size"]), np.float32)
    with torch.no_grad():
        given, at = torch.from_numpy(x), torch.arange(100)[None]
        rotary = model.rotary_emb(given, at)
        expected = (
            model.layers[1]
            .self_attn(hidden_states=given, attention_mask=causal(100), position_embeddings=rotary)[
                0
            ]
            .numpy()
        )

    layer_config = mla.MLAConfig.from_hf(config)
    weights = mla.load_weights(tensors, layer_config, prefix="model.layers.1.self_attn.")
    pages = PagePool(2, max_pages_per_seq=2)
    pages.add("a")
    pool = cache.make_pool(1, 2, dtype=jnp.float32) + jnp.nan
    parts = []
    for begin, end in ((0, 98), (98, 100)):
        slots = pages.append({"a": end - begin}).slots
        rows = pages.rows(["a"])
        if begin:
            step = mla.decode_step(layer_config, rows.block_table, rows.cache_seqlens, slots)
        else:
            new = np.array([end], np.int32)
            step = mla.prefill_step(layer_config, rows.block_table, rows.cache_seqlens, new, slots)
        run = jax.jit(mla.decode if begin else mla.prefill, static_argnums=1)
        y, pool = run(weights, layer_config, jnp.asarray(x[:, begin:end]), pool, step)
        parts.append(np.asarray(y))
    got = np.concatenate(parts, axis=1)
    assert np.abs(got - expected).max() / np.sqrt(np.square(expected).mean()) <= BOUND


@pytest.mark.parametrize("config", RELEASED.values(), ids=RELEASED.keys())
def test_constants_of_released_models(config: dict[str, Any]) -> None:
    """Softmax scale, frequencies and their scale as transformers derives them."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    # Kimi-K2's files name DeepSeek-V3's code.
    name = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    made = transformers.AutoConfig.for_model(name, num_hidden_layers=1, vocab_size=8, **fields)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(made)
    rotary = type(model.rotary_emb)(made)
    ours = mla.MLAConfig.from_hf(config)
    assert ours.softmax_scale == pytest.approx(model.layers[0].self_attn.scaling, rel=1e-12)
    np.testing.assert_allclose(inverse_frequencies(ours), rotary.inv_freq.numpy(), rtol=5e-7)
    scale = ours.yarn.rotation_scale if ours.yarn else 1.0
    assert scale == pytest.approx(rotary.attention_scaling, rel=1e-12)
    saved = made.to_dict()  # what a new config.json holds
    assert mla.MLAConfig.from_hf(saved) == ours
    norms = model.layers[0].self_attn.kv_a_layernorm.variance_epsilon
    assert ours.latent_norm_eps == norms


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v2"])
def test_rotations_by_position(model_type: str) -> None:
    """Far ones too: the float32 angle is the reference's, up to a rounding of the frequency."""
    config = RELEASED["DeepSeek-V3" if model_type == "deepseek_v3" else "DeepSeek-V2-Lite"]
    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(model_type, **fields)
    module = getattr(transformers.models, model_type)
    name = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}[model_type]
    modeling = getattr(module, f"modeling_{model_type}")
    rotary = getattr(modeling, f"{name}RotaryEmbedding")(made)
    at = np.array([0, 1, 63, 64, 1000, 4095, 131071], np.int32)
    told = rotary(torch.zeros(1), torch.from_numpy(at.astype(np.int64))[None])
    if isinstance(told, tuple):
        cos, sin = (x[0, :, :32].numpy() for x in told)
    else:
        cos, sin = told[0].real.numpy(), told[0].imag.numpy()
    ours = mla.cos_sin(mla.MLAConfig.from_hf(config), jnp.asarray(at))
    room = 1e-6 + 2.4e-7 * at[:, None].astype(np.float64)
    assert (np.abs(np.asarray(ours[0]) - cos) <= room).all()
    assert (np.abs(np.asarray(ours[1]) - sin) <= room).all()
