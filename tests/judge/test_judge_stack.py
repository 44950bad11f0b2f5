"""Logits of a dense stack, teacher-forced through prefill and decode, against transformers."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import dense_stack
import numpy as np
import pytest
import reference_model
import serving
from dense_stack import YARN

from jax_flashmla import mla

BOUND = 1e-4  # largest difference over the reference's root mean square, in float32
DECODE_STEPS = 64
V2_SCALES = {"mscale": 0.707, "mscale_all_dim": 0.707}
UNEQUAL_SCALES = {"mscale": 1.0, "mscale_all_dim": 0.5}  # cos and sin get a factor too
CONFIGS = {
    "v2": dense_stack.hf_config("deepseek_v2", q_lora_rank=None),
    "v2-q_lora-yarn": dense_stack.hf_config("deepseek_v2", rope_scaling=YARN | V2_SCALES),
    "v3-yarn-bias": dense_stack.hf_config(
        "deepseek_v3", rope_scaling=YARN | UNEQUAL_SCALES, attention_bias=True
    ),
    "v3-half_split": dense_stack.hf_config(
        "deepseek_v3",
        q_lora_rank=None,
        rope_interleave=False,
        num_attention_heads=8,
        num_key_value_heads=8,
    ),
    "v3-half_split-yarn": dense_stack.hf_config(
        "deepseek_v3",
        rope_interleave=False,
        rope_parameters={"rope_theta": 50000.0, "rope_type": "yarn"}
        | {key: value for key, value in YARN.items() if key != "type"},
    ),
    "glm": dense_stack.hf_config(
        "glm4_moe_lite", mlp_layer_types=["dense"] * 3, qk_nope_head_dim=48, v_head_dim=64
    ),
}


@dataclasses.dataclass
class Judge:
    """Collects what was computed for each request's tokens, in order, beside the reference."""

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    tokens: Mapping[Hashable, np.ndarray]

    def __post_init__(self) -> None:
        self.model = reference_model.build(self.config, self.tensors)
        self.done = dict.fromkeys(self.tokens, 0)
        self.worst = 0.0
        self.expected = {
            name: reference_model.logits(self.model, ids) for name, ids in self.tokens.items()
        }

    def next(self, counts: Mapping[Hashable, int]) -> dict[Hashable, np.ndarray]:
        """The requests' next tokens."""
        return {
            name: self.tokens[name][self.done[name] : self.done[name] + count]
            for name, count in counts.items()
        }

    def compare(self, logits: Mapping[Hashable, np.ndarray]) -> None:
        """Judges the logits of the tokens that `next` gave."""
        for name, got in logits.items():
            expected = self.expected[name]
            part = expected[self.done[name] : self.done[name] + len(got)]
            self.done[name] += len(got)
            error = np.abs(got - part).max() / np.sqrt(np.square(expected).mean())
            self.worst = max(self.worst, error) if np.isfinite(error) else np.inf


def random_tokens(config: Mapping[str, Any], **lengths: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.integers(0, config["vocab_size"], n) for name, n in lengths.items()}


def serve(config: Mapping[str, Any], **options: Any) -> serving.Server:  # noqa: ANN401
    weights = dense_stack.load(dense_stack.random_tensors(config), config)
    return serving.Server(weights, mla.MLAConfig.from_hf(config), **options)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_prefill_in_chunks_and_decode(config: dict[str, Any]) -> None:
    """Ragged batch, prefix pages shared and copied on write, rows that pad the batch."""
    tokens = random_tokens(config, long=130 + 64, one=1 + 64, page=65 + 64, fork=90 + 64)
    tokens["fork"][:70] = tokens["long"][:70]  # a page and six tokens of the next one
    judge = Judge(config, dense_stack.random_tensors(config), tokens)
    server = serve(config)
    judge.compare(server.prefill(judge.next({"long": 80, "one": 1, "page": 65})))
    server.pages.fork("long", "fork", tokens=70)
    judge.done["fork"] = 70
    judge.compare(server.prefill(judge.next({"fork": 20, "long": 50})))
    for _ in range(DECODE_STEPS):
        judge.compare(server.decode(judge.next(dict.fromkeys(tokens, 1))))
    assert judge.done == {name: len(ids) for name, ids in tokens.items()}
    assert judge.worst <= BOUND


def test_decode_of_several_tokens_with_rejected_drafts() -> None:
    config = CONFIGS["v2-q_lora-yarn"]
    judge = Judge(
        config, dense_stack.random_tensors(config), random_tokens(config, a=62 + 12, b=3 + 12)
    )
    server = serve(config)
    judge.compare(server.prefill(judge.next({"a": 62, "b": 3})))
    for s_q in (3, 2, 4, 3):
        draft = {"a": np.arange(s_q), "b": np.arange(s_q)}
        server.decode(draft)  # accepted by nobody
        for name in draft:
            server.pages.rewind(name, s_q)
        judge.compare(server.decode(judge.next({"a": s_q, "b": s_q})))
    assert judge.worst <= BOUND


class WrongScale(mla.MLAConfig):
    """Scales by the absorbed query's columns."""

    @property
    def softmax_scale(self) -> float:
        return 576**-0.5


CONTROL = CONFIGS["v2-q_lora-yarn"] | {"num_hidden_layers": 2, "first_k_dense_replace": 2}
RIGHT = mla.MLAConfig.from_hf(CONTROL)
FIELDS = {field.name: getattr(RIGHT, field.name) for field in dataclasses.fields(RIGHT)}
CONTROLS: dict[str, tuple[mla.MLAConfig, serving.Change]] = {
    "nothing": (RIGHT, lambda step: step),
    "scale of 576 columns": (WrongScale(**FIELDS), lambda step: step),
    "scale without mscale": (
        dataclasses.replace(RIGHT, yarn=dataclasses.replace(RIGHT.yarn, mscale_all_dim=None)),
        lambda step: step,
    ),
    "no rope": (RIGHT, lambda step: step._replace(cos=step.cos * 0 + 1, sin=step.sin * 0)),
    "no yarn": (dataclasses.replace(RIGHT, yarn=None), lambda step: step),
    "other pairs": (dataclasses.replace(RIGHT, rope_interleave=False), lambda step: step),
    "norm epsilon": (dataclasses.replace(RIGHT, latent_norm_eps=1e-2), lambda step: step),
    "causal off by one": (RIGHT, lambda s: s._replace(cache_seqlens=s.cache_seqlens - 1)),
}


@pytest.mark.parametrize(("config", "change"), CONTROLS.values(), ids=CONTROLS.keys())
def test_bound_is_broken_by(config: mla.MLAConfig, change: serving.Change) -> None:
    """By each mistake on its own, in prefill and in decode; by no mistake in neither."""
    tokens = random_tokens(CONTROL, a=70 + 4, b=40 + 4)
    judge = Judge(CONTROL, dense_stack.random_tensors(CONTROL), tokens)
    server = serve(CONTROL)
    server.config, server.change = config, change
    judge.compare(server.prefill(judge.next({"a": 70, "b": 40})))
    prefill, judge.worst = judge.worst, 0.0

    # Decode on its own: the prompt's cache is the right one.
    judge.done = dict.fromkeys(tokens, 0)
    server = serve(CONTROL)
    server.prefill(judge.next({"a": 70, "b": 40}))
    judge.done = {"a": 70, "b": 40}
    server.config, server.change = config, change
    for _ in range(4):
        judge.compare(server.decode(judge.next({"a": 1, "b": 1})))
    broken = config is not RIGHT or change is not CONTROLS["nothing"][1]
    assert (prefill > BOUND, judge.worst > BOUND) == (broken, broken)
