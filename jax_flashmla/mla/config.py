"""What an MLA layer's arithmetic depends on, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from jax_flashmla._shapes import KV_LORA_RANK, ROPE_DIM

# Model types whose attention is computed here, and their `rope_interleave` where none is given.
_MODEL_TYPES = {
    "deepseek_v2": True,
    "deepseek_v3": True,
    "glm4_moe_lite": True,
    "kimi_k2": True,
}
# Fields of other MLA models that change the arithmetic, with the values that leave it alone.
_FOREIGN_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "index_head_dim": (None,),  # sparse attention: an indexer chooses the keys
    "index_n_heads": (None,),
    "index_topk": (None,),
    "mla_scale_kv_lora": (None, False),
    "mla_scale_q_lora": (None, False),
    "mla_use_nope": (None, False),
    "mla_use_output_gate": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "sliding_window": (None,),
    "use_qk_norm": (None, False),
}
_ROPE_FIELDS = {"partial_rotary_factor", "rope_theta", "rope_type", "type"}
_YARN_FIELDS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "truncate",
}


class ConfigError(ValueError):
    """A field is missing, or asks for arithmetic that is not computed here."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's stretched context (Peng et al., arXiv:2309.00071), with DeepSeek's two mscales.

    Attributes:
        factor: new context length over the original one.
        original_max_position_embeddings: context length before the stretch.
        beta_fast: columns that turn more often than this within the original context keep their
            frequency,
        beta_slow: those that turn less often are slowed down by `factor`, a ramp lies between.
        mscale: of cos and sin; with `mscale_all_dim` the ratio of both counts.
        mscale_all_dim: of the softmax scale; None or 0 leaves it alone.
        attention_factor: of cos and sin, given directly.
        truncate: whether the ramp begins and ends at whole columns.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def rotation_scale(self) -> float:
        """Factor of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def logit_scale(self) -> float:
        """Factor of the softmax scale."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """The dimensions and constants of one MLA layer; all layers of a model share them.

    Attributes:
        hidden_size: columns of the residual stream.
        num_attention_heads: query heads, h_q.
        qk_nope_head_dim: columns per head of q and k that are not rotated.
        v_head_dim: columns per head of v.
        q_lora_rank: width of the queries' bottleneck, None where there is none.
        rope_theta: base of the rotary frequencies.
        rope_interleave: whether columns that rotate together are neighbours in the weights.
        yarn: the stretch of the context, None without.
        attention_bias: whether the projections from and to the hidden size have a bias (q_a_proj,
            kv_a_proj_with_mqa, o_proj; q_proj never has one).
        rms_norm_eps: of the norms between layers. No function here uses it: the layer's own norms
            have `latent_norm_eps`.
        latent_norm_eps: of q_a_layernorm and kv_a_layernorm. DeepSeek's code and transformers build
            these with 1e-6, whatever rms_norm_eps says.
        kv_lora_rank: 512.
        qk_rope_head_dim: 64.
    """

    hidden_size: int
    num_attention_heads: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: Yarn | None = None
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6
    kv_lora_rank: int = KV_LORA_RANK
    qk_rope_head_dim: int = ROPE_DIM

    def __post_init__(self) -> None:
        """Checks the dimensions.

        Raises:
            ConfigError: a dimension is no positive int, or one that the kernels do not have.
        """
        for name in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "v_head_dim"):
            _check_size(name, getattr(self, name))
        if self.q_lora_rank is not None:
            _check_size("q_lora_rank", self.q_lora_rank)
        for name, fixed in (("kv_lora_rank", KV_LORA_RANK), ("qk_rope_head_dim", ROPE_DIM)):
            if getattr(self, name) != fixed:
                _refuse(name, getattr(self, name), str(fixed))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MLAConfig":
        """Reads the dict of a `config.json`, with the rope settings in their old or new place.

        Args:
            config: of a model whose `model_type` is deepseek_v2, deepseek_v3, kimi_k2 or
                glm4_moe_lite. Fields that have no part in attention are ignored.

        Raises:
            ConfigError: a field is missing or asks for what is not computed here.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            _refuse("model_type", model_type, "one of " + ", ".join(sorted(_MODEL_TYPES)))
        _check_foreign_fields(config)
        rope = _rope_fields(config)
        interleave = config.get("rope_interleave")
        if interleave is None or model_type == "deepseek_v2":  # V2 has no such field
            interleave = _MODEL_TYPES[model_type]
        return cls(
            hidden_size=_required(config, "hidden_size"),
            num_attention_heads=_required(config, "num_attention_heads"),
            qk_nope_head_dim=_required(config, "qk_nope_head_dim"),
            v_head_dim=_required(config, "v_head_dim"),
            q_lora_rank=config.get("q_lora_rank"),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_interleave=bool(interleave),
            yarn=_yarn(config, rope),
            attention_bias=bool(config.get("attention_bias")),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            kv_lora_rank=_required(config, "kv_lora_rank"),
            qk_rope_head_dim=_required(config, "qk_rope_head_dim"),
        )

    @property
    def qk_head_dim(self) -> int:
        """Columns per head of q and k before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the logits: of the columns before absorption, and YaRN's."""
        return self.qk_head_dim**-0.5 * (self.yarn.logit_scale if self.yarn else 1.0)


def _check_foreign_fields(config: Mapping[str, Any]) -> None:
    for name, harmless in _FOREIGN_FIELDS.items():
        if config.get(name) not in harmless:
            _refuse(name, config[name], "none: what it does is not computed here")
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        _refuse(
            "num_key_value_heads", config["num_key_value_heads"], f"num_attention_heads, {heads}"
        )


def _rope_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope settings: `rope_scaling` of older files, `rope_parameters` of newer ones."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and dict(old) != dict(new):
        raise ConfigError("rope_scaling, rope_parameters: got both, expected one, or the same")
    return old or new or {}


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        _refuse("rope_type", kind, "default or yarn")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        _refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1")
    for name in sorted(set(rope) - _ROPE_FIELDS - _YARN_FIELDS):
        if rope[name] is not None:
            _refuse(name, rope[name], "none in the rope settings: it is not known here")
    if kind == "default":
        return None
    longest = config.get("max_position_embeddings")
    original = (
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or longest
    )
    if not original:
        raise ConfigError("original_max_position_embeddings: got none, yarn needs it")
    factor = rope.get("factor") or (longest / original if longest else None)
    if not factor:
        raise ConfigError("factor: got none in the rope settings, yarn needs it")
    given = {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
    given |= {"factor": float(factor), "original_max_position_embeddings": int(original)}
    return Yarn(**given)


def _required(config: Mapping[str, Any], name: str) -> int:
    if config.get(name) is None:
        raise ConfigError(f"{name}: got none, expected an int")
    return config[name]


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(name, value, "a positive int")


def _refuse(name: str, got: object, expected: str) -> NoReturn:
    raise ConfigError(f"{name}: got {got!r}, expected {expected}")
