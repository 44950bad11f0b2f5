"""Norm, rotation and append in one: against float64, as one call, under vmap, with bad input."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla import _dispatch, _ffi, cache
from jax_flashmla.testing import cache_oracle
from jax_flashmla.testing.cache_oracle import bits

PAGES, ROWS, EPS = 6, 20, 1e-6
Arrays = dict[str, Any]


def arrays(dtype: str = "float32", *, width: int = 640, seed: int = 0) -> Arrays:
    """Every third slot is outside the pool; rows differ in size, one is zero."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(PAGES * 64)[:ROWS].astype(np.int32)
    slots[::3] = np.resize(np.int32([-1, PAGES * 64, -(2**31), 2**31 - 1]), len(slots[::3]))
    sizes = np.logspace(-3, 3, ROWS)[:, None] * (np.arange(ROWS) != 4)[:, None]
    angles = rng.uniform(-9, 9, (ROWS, 32))
    made = {
        "cache": rng.standard_normal((PAGES, 64, 1, 576)),
        "projected": rng.standard_normal((ROWS, width)) * sizes,
        "latent_norm": 1 + 0.3 * rng.standard_normal(512),
    }
    half = {name: x.astype(np.float32).astype(jnp.dtype(dtype)) for name, x in made.items()}
    rotation = {"cos": np.cos(angles), "sin": np.sin(angles)}
    return half | {"slots": slots} | {name: np.float32(x) for name, x in rotation.items()}


append = functools.partial(cache.append_projected, norm_eps=EPS)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("width", [576, 579, 2112])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_normed_and_rotated_and_rounded_once(
    dtype: str, width: int, interleave: bool
) -> None:
    given = arrays(dtype, width=width)
    got = append(**given, rope_interleave=interleave)
    faults = cache_oracle.projected_faults(got, given, eps=EPS, interleave=interleave)
    assert faults == 0


def test_the_oracle_sees_another_epsilon_and_a_missing_norm() -> None:
    given = arrays()
    for wrong in (append(**given | {"latent_norm": np.ones(512, np.float32)}), given["cache"]):
        assert cache_oracle.projected_faults(wrong, given, eps=EPS, interleave=False) > 1000
    other = functools.partial(cache.append_projected, norm_eps=1e-2)(**given)
    assert cache_oracle.projected_faults(other, given, eps=EPS, interleave=False) > 1000


def test_vmap_over_pools_appends_to_each() -> None:
    one, other = arrays(seed=1), arrays(seed=2)
    other["latent_norm"] = one["latent_norm"]
    stacked = {name: np.stack([one[name], other[name]]) for name in one if name != "latent_norm"}
    norm = functools.partial(append, latent_norm=one["latent_norm"])
    got = jax.jit(jax.vmap(lambda x: norm(**x)))(stacked)
    for pool, given in zip(got, (one, other), strict=True):
        np.testing.assert_array_equal(bits(pool), bits(append(**given)))
    both = stacked | {"latent_norm": np.stack([one["latent_norm"]] * 2)}
    with pytest.raises(ValueError, match="latent_norm: got one for each row of a vmap"):
        jax.vmap(lambda x: append(**x))(both)


def test_cuda_gets_one_call_that_aliases_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    described = jax.tree.map(jax.typeof, jax.tree.map(jnp.asarray, arrays("bfloat16")))
    step = jax.jit(lambda x: append(**x, rope_interleave=True))
    text = step.trace(described).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"= stablehlo\.(\w+) ?(@\w+)?", text)
    assert calls == [("custom_call", f"@{_ffi.APPEND_PROJECTED_TARGET}")]
    line = next(line for line in text.splitlines() if "custom_call" in line)
    assert "interleave = true, norm_eps = 9.99999997E-7 : f32" in line
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 0," in line


def test_columns_that_are_no_multiple_of_eight_have_no_kernel() -> None:
    with pytest.raises(ValueError, match="projected has 579 columns; the kernel reads 16 bytes"):
        append(**arrays("bfloat16", width=579), implementation="cuda")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"projected": np.zeros((ROWS, 575), np.float32)}, "projected: got 575 columns, expected"),
        (
            {"projected": np.zeros(576, np.float32)},
            r"projected: got shape \[576\], expected \[n, w",
        ),
        ({"latent_norm": np.zeros(576, np.float32)}, r"latent_norm: got shape \[576\], expected"),
        ({"latent_norm": np.zeros(512, np.float16)}, "latent_norm: got float16, expected float32"),
        ({"slots": np.zeros(ROWS, np.float32)}, "slots: got float32, expected int32"),
        ({"cos": np.zeros((ROWS, 64), np.float32)}, r"cos: got shape \[20, 64\], expected"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0, expected a finite positive float32"),
        ({"norm_eps": jnp.float32(1e-6)}, "norm_eps: got .* expected a Python or NumPy number"),
    ],
)
def test_bad_input_is_named(wrong: Arrays, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        append(**arrays() | wrong)
