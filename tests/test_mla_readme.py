"""The code of the page "MLA in JAX" runs as it stands, in its order."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import mla

PAGE = Path(mla.__file__).with_name("README.md").read_text(encoding="utf-8")
HF = dense_stack.hf_config("deepseek_v3", num_hidden_layers=2, hidden_size=128)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is defined after all code ran, beside a config.json and a checkpoint of small size."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(HF))
    stub = types.ModuleType("safetensors.flax")
    stub.load_file = lambda _: dense_stack.random_tensors(HF)
    defined: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
        patch.setitem(sys.modules, "safetensors.flax", stub)
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, defined)
    return defined


def test_code_runs_to_the_end(names: dict[str, Any]) -> None:
    assert len(re.findall("```python", PAGE)) == 9
    assert names["x"].shape == (4, 3, 128)
    assert np.isfinite(np.asarray(names["x"], np.float32)).all()
    assert not names["x"][3].any() or names["rows"].cache_seqlens[3] == 0
    assert names["pages"].length("a") == 100 + 50 + 3 + 3 - 2
    assert len(names["layers"]) == 2
    assert names["hidden"].shape == (2, 1, 128)
    assert np.isfinite(np.asarray(names["hidden"], np.float32)).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(names["layers"])} == {jnp.dtype("bfloat16")}


def test_scan_is_the_loop(names: dict[str, Any]) -> None:
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *names["layers"])
    pool, rest = names["pool"], (names["x"], names["step"])
    looped, _ = names["forward"](names["layers"], rest[0], jnp.array(pool), rest[1], run=mla.decode)
    scanned, _ = names["scanned"](stacked, rest[0], jnp.array(pool), rest[1])
    wide = np.asarray(looped, np.float32)
    np.testing.assert_allclose(np.asarray(scanned, np.float32), wide, rtol=0.05, atol=0.05)


def test_links_and_names_exist() -> None:
    for name in re.findall(r"`mla\.(\w+)`", PAGE):
        assert hasattr(mla, name), name
