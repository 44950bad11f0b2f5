"""What the `config.json` files of released models say about attention."""

from typing import Any

_DIMS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}


def _heads(count: int) -> dict[str, int]:
    return {"num_attention_heads": count, "num_key_value_heads": count}


def _yarn(factor: float, mscale: float, **fields: float) -> dict[str, Any]:
    common = {
        "type": "yarn",
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }
    return common | fields


RELEASED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "q_lora_rank": None,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _yarn(40, 0.707),
        **_heads(16),
        **_DIMS,
    },
    "DeepSeek-V2": {
        "model_type": "deepseek_v2",
        "hidden_size": 5120,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _yarn(40, 0.707),
        **_heads(128),
        **_DIMS,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "q_lora_rank": 1536,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": _yarn(40, 1.0),
        **_heads(128),
        **_DIMS,
    },
    "Kimi-K2": {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "q_lora_rank": 1536,
        "max_position_embeddings": 131072,
        "rope_theta": 50000.0,
        "rope_scaling": _yarn(32.0, 1.0, beta_fast=1.0, beta_slow=1.0),
        **_heads(64),
        **_DIMS,
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "hidden_size": 2048,
        "q_lora_rank": 768,
        "max_position_embeddings": 202752,
        "rope_theta": 1000000,
        "rope_scaling": None,
        **_heads(20),
        **_DIMS,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
    },
}
