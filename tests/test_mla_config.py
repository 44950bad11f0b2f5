"""What is read from a config.json, what is refused, and the constants that follow."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from model_configs import RELEASED

from jax_flashmla import mla
from jax_flashmla.mla.rope_table import inverse_frequencies

V3 = RELEASED["DeepSeek-V3"]


def read(**changes: Any) -> mla.MLAConfig:  # noqa: ANN401
    return mla.MLAConfig.from_hf(V3 | changes)


def yarn(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return V3["rope_scaling"] | changes


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("DeepSeek-V2-Lite", 192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2),
        ("DeepSeek-V3", 192**-0.5 * (0.1 * math.log(40) + 1) ** 2),
        ("Kimi-K2", 192**-0.5 * (0.1 * math.log(32) + 1) ** 2),
        ("GLM-4.7-Flash", 256**-0.5),
    ],
)
def test_softmax_scale_of_released_models(name: str, scale: float) -> None:
    assert mla.MLAConfig.from_hf(RELEASED[name]).softmax_scale == pytest.approx(scale, rel=1e-12)


def test_released_models_are_read_whole() -> None:
    got = read()
    assert (got.hidden_size, got.num_attention_heads, got.q_lora_rank) == (7168, 128, 1536)
    assert got.yarn == mla.Yarn(40.0, 4096, 32, 1, 1.0, 1.0)
    lite = mla.MLAConfig.from_hf(RELEASED["DeepSeek-V2-Lite"])
    assert (lite.q_lora_rank, lite.rope_interleave, lite.qk_head_dim) == (None, True, 192)


def test_rope_settings_are_found_in_either_place() -> None:
    new = {key: value for key, value in yarn(rope_theta=10000).items() if key != "type"}
    moved = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta")}
    moved["rope_parameters"] = new | {"rope_type": "yarn"}
    assert mla.MLAConfig.from_hf(moved) == read()
    plain = moved | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert mla.MLAConfig.from_hf(plain).rope_theta == 5e5
    assert mla.MLAConfig.from_hf(plain).yarn is None


def test_yarn_defaults() -> None:
    got = read(
        rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    ).yarn
    assert got == mla.Yarn(40.0, 4096, 32.0, 1.0, None, None)  # 163840 / 4096
    assert got.rotation_scale == pytest.approx(0.1 * math.log(40) + 1)
    assert got.logit_scale == 1.0
    assert mla.Yarn(0.5, 4096, mscale=1.0, mscale_all_dim=1.0).logit_scale == 1.0
    assert mla.Yarn(40.0, 4096, attention_factor=1.5).rotation_scale == 1.5


def test_interleave_follows_the_family() -> None:
    assert read().rope_interleave
    assert not read(rope_interleave=False).rope_interleave
    assert read(model_type="deepseek_v2", rope_interleave=False).rope_interleave


def test_latent_norms_keep_their_own_epsilon() -> None:
    assert (read(rms_norm_eps=1e-5).rms_norm_eps, read(rms_norm_eps=1e-5).latent_norm_eps) == (
        1e-5,
        1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"kv_lora_rank": 256}, "kv_lora_rank"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 12.5}, "hidden_size"),
        ({"v_head_dim": None}, "v_head_dim"),
        ({"q_lora_rank": -1}, "q_lora_rank"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"index_topk": 2048}, "index_topk"),
        ({"index_n_heads": 64}, "index_n_heads"),
        ({"mla_scale_q_lora": True}, "mla_scale_q_lora"),
        ({"mla_use_nope": True}, "mla_use_nope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_scaling": yarn(type="linear")}, "rope_type"),
        ({"rope_scaling": yarn(type="llama3")}, "rope_type"),
        ({"rope_scaling": yarn(partial_rotary_factor=0.5)}, "partial_rotary_factor"),
        ({"rope_scaling": yarn(llama_4_scaling_beta=0.1)}, "llama_4_scaling_beta"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling, rope_parameters"),
        (
            {"rope_scaling": yarn(factor=None), "max_position_embeddings": None},
            "factor",
        ),
        (
            {
                "rope_scaling": yarn(original_max_position_embeddings=None),
                "max_position_embeddings": None,
            },
            "original_max_position_embeddings",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_changes_the_arithmetic_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(mla.ConfigError, match=f"^{field}: got"):
        read(**changes)


def test_fields_without_a_part_in_attention_are_ignored() -> None:
    assert (
        read(n_routed_experts=256, quantization_config={"fmt": "e4m3"}, index_topk=None) == read()
    )


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    stretched = inverse_frequencies(read())
    plain = inverse_frequencies(dataclasses.replace(read(), yarn=None))
    np.testing.assert_allclose(plain, 10000.0 ** -(np.arange(32) / 32), rtol=1e-7)
    # 64 ln(4096 / (2 pi 32)) / (2 ln 10000) = 10.5, and 22.5 for one turn.
    np.testing.assert_array_equal(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-6)
    ratios = plain[10:24] / stretched[10:24]
    assert (np.diff(ratios) > 0).all()


def test_yarn_ramp_of_no_width_is_a_step() -> None:
    kimi = mla.MLAConfig.from_hf(RELEASED["Kimi-K2"])
    ratios = inverse_frequencies(dataclasses.replace(kimi, yarn=None)) / inverse_frequencies(kimi)
    assert set(np.round(ratios).astype(int)) == {1, 32}


def test_rotations_have_unit_length_times_yarns_factor() -> None:
    config = read(rope_scaling=yarn(mscale_all_dim=0.5))
    cos, sin = mla.cos_sin(config, jnp.array([[0, 1, 131071]], jnp.int32))
    assert cos.shape == sin.shape == (1, 3, 32)
    length = np.square(np.asarray(cos)) + np.square(np.asarray(sin))
    assert length == pytest.approx(config.yarn.rotation_scale**2, rel=1e-5)


def test_rotations_far_away_are_those_of_the_float32_angle() -> None:
    positions = np.array([0, 1, 4096, 131071], np.int32)
    cos, sin = mla.cos_sin(read(), jnp.asarray(positions))
    angles = positions[:, None].astype(np.float32) * inverse_frequencies(read())
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), atol=2e-6)


def test_rotations_of_padding_rows_are_finite() -> None:
    cos, sin = mla.cos_sin(read(), jnp.array([-1, -(2**31)], jnp.int32))
    assert (np.asarray(cos) == 1).all()
    assert (np.asarray(sin) == 0).all()
