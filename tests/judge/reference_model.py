"""The reference: transformers' model on the same tensors, in eager PyTorch on the CPU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

# Whoever imports this module is skipped where these are not installed.
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Once in some 2,000 runs, with two threads, the reference's last token moved by 2e-4 of an
# attention's result, while the layer under test gave the bits that it always gives.
torch.set_num_threads(1)


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    dtype: "torch.dtype" = torch.float32,
) -> "torch.nn.Module":
    """The causal language model of a config, holding exactly these tensors."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **fields)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    state = {name: torch.from_numpy(np.asarray(x)) for name, x in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval()


def logits(model: "torch.nn.Module", tokens: np.ndarray) -> np.ndarray:
    """Logits float32 `[tokens, vocabulary]` of one request, every token seeing those before."""
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return model(ids, use_cache=False).logits[0].float().numpy()
