"""Writes tests/data/bf16_reference.npz: what transformers computes in float32 and in bfloat16.

    python tests/judge/make_bf16_fixture.py

The weights are those of `dense_stack.random_tensors`, rounded to bfloat16 for both runs; the file
holds tokens and logits only. A machine without transformers judges the kernel by it.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import bf16_reference
import dense_stack
import reference_model
from reference_model import torch


def main() -> None:
    """Runs both precisions on every model of `bf16_reference`."""
    arrays = {}
    for name, config in bf16_reference.CONFIGS.items():
        tensors = bf16_reference.rounded(dense_stack.random_tensors(config))
        tokens = bf16_reference.tokens(config)
        for dtype in (torch.float32, torch.bfloat16):
            model = reference_model.build(config, tensors, dtype)
            for request, ids in tokens.items():
                logits = reference_model.logits(model, ids)
                key = bf16_reference.key(name, request, str(dtype).removeprefix("torch."))
                arrays[key] = logits
    np.savez_compressed(bf16_reference.PATH, **arrays)
    print(f"{bf16_reference.PATH}: {bf16_reference.PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
