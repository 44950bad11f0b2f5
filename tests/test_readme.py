"""The README's example runs, and its operation is the reference."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import reference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(section: str) -> str:
    """Returns the first Python block of a section."""
    text = README.split(f"\n## {section}\n")[1]
    return text.split("```python\n")[1].split("```")[0]


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("Example"), {})
    assert capsys.readouterr().out.startswith("(2, 1, 16, 512) (2, 1, 16) jax_flashmla ")


def test_example_has_ten_lines() -> None:
    lines = [line for line in block("Example").splitlines() if line]
    assert len(lines) == 10


def test_model_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("A model's attention"), {})
    assert capsys.readouterr().out == "(2, 1, 256) [73  8]\n"


def test_context_parallel_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("Context parallelism"), {})
    assert capsys.readouterr().out == "(2, 1, 16, 512) (2, 1, 16)\n"


def test_export_example_gives_a_program() -> None:
    names: dict[str, object] = {}
    exec(block("Export"), names)
    exported = names["export"].deserialize(names["program"])
    assert exported.platforms == ("cpu", "cuda")
    assert str(exported.in_avals[4].shape[0]) == "b"


def test_operation_is_the_definition() -> None:
    names = {"jax": jax, "jnp": jnp}
    exec(block("The operation"), names)
    keys = jax.random.split(jax.random.key(0), 3)
    q_latent = jax.random.normal(keys[0], (2, 4, 512))
    q_rope = jax.random.normal(keys[1], (2, 4, 64))
    kv_cache = jax.random.normal(keys[2], (3, 64, 1, 576))
    pages = jnp.array([2, 0], jnp.int32)

    out, lse = names["mla_decode"](q_latent, q_rope, kv_cache, pages, 0.1)

    q = jnp.concatenate([q_latent, q_rope], -1)[None]
    lengths = jnp.array([128], jnp.int32)
    expected_out, expected_lse = reference.definition(
        q, kv_cache, pages[None], lengths, softmax_scale=0.1, causal=False
    )
    np.testing.assert_allclose(out, expected_out[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse, expected_lse[0], rtol=1e-5)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_cache_example_writes_one_token_per_request_and_layer() -> None:
    names: dict[str, object] = {}
    exec(block("The cache"), names)
    tokens = np.asarray(names["pool"], np.float32).reshape(-1, 576)
    assert np.flatnonzero(tokens.any(axis=1)).tolist() == [0, 70, 512, 582]


def test_mesh_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("Meshes"), {})
    assert capsys.readouterr().out == "P('data', None, None, None) (8, 1, 16, 512)\n"
