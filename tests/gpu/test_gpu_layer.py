"""The MLA layer in bfloat16 with the kernels: its error beside transformers', and its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bf16_reference
import dense_stack
import jax.numpy as jnp
import numpy as np
import pytest
import serving

from jax_flashmla import mla

MOST_TIMES_THEIRS = 1.2
PEAK_MEMORY = Path(__file__).parent / "peak_memory.py"


@pytest.mark.parametrize("name", bf16_reference.CONFIGS)
def test_error_is_at_most_a_fifth_above_transformers(name: str, implementation: str) -> None:
    """Against transformers in float32, where transformers in bfloat16 has an error too."""
    config = bf16_reference.CONFIGS[name]
    tokens = bf16_reference.tokens(config)
    weights = dense_stack.load(dense_stack.random_tensors(config), config, jnp.bfloat16)
    server = serving.Server(
        weights, mla.MLAConfig.from_hf(config), options={"implementation": implementation}
    )
    decoded = bf16_reference.DECODED
    parts = [server.prefill({name: ids[:-decoded] for name, ids in tokens.items()})]
    for at in range(decoded):
        now = {name: ids[len(ids) - decoded + at :][:1] for name, ids in tokens.items()}
        parts.append(server.decode(now))
    got = {name: np.concatenate([part[name] for part in parts]) for name in tokens}

    recorded = np.load(bf16_reference.PATH)
    theirs = {
        request: recorded[bf16_reference.key(name, request, "bfloat16")] for request in tokens
    }
    allowed = MOST_TIMES_THEIRS * bf16_reference.error(theirs, name, recorded)
    assert bf16_reference.error(got, name, recorded) <= allowed


def test_a_step_takes_no_memory_of_the_caches_size(rehearsal: bool) -> None:
    """In a process of its own, whose peak is that of the step: weights, pool and little else."""
    if rehearsal:
        pytest.skip("the CPU backend counts no memory")
    done = subprocess.run(
        [sys.executable, "-P", str(PEAK_MEMORY)],
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    told = json.loads(done.stdout)
    assert told["same_pointer"]
    assert told["peak"] - told["before"] < told["pool"] / 16
    assert told["temporary"] < told["pool"] / 16
