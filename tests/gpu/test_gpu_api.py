"""The public functions on the GPU: FlashMLA's form, defaults, and which path runs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla.testing import checking, inputs
from jax_flashmla.testing.cases import Case, Shape

Fit = Callable[[Shape], Shape]
SHAPES = (
    Shape(6, 1, 16, pages=24),
    Shape(6, 3, 128, pages=24, dtype="float16"),
    Shape(3, 2, 24, h_kv=3, pages=8, pool_pages=512, causal=False),
)
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def flash_mla(shape: Shape, data: inputs.Inputs, *, own_metadata: bool) -> checking.Decoded:
    """FlashMLA's two functions on the same data, its default scale and mask made explicit."""
    q = jnp.concatenate([data.q_latent, data.q_rope], axis=-1)
    metadata = (None, None)
    if own_metadata:
        metadata = jax_flashmla.get_mla_metadata(data.cache_seqlens, shape.rows, shape.h_kv)
    return jax_flashmla.flash_mla_with_kvcache(
        q, data.kv_cache, data.block_table, data.cache_seqlens, 512, *metadata, causal=shape.causal
    )


@with_shape
@pytest.mark.parametrize("own_metadata", [True, False])
@pytest.mark.parametrize("lengths", ["edges", "ragged", "shorter_than_s_q"])
def test_flashmla_form_gives_the_same_bits(
    shape: Shape, own_metadata: bool, lengths: str, fit: Fit, implementation: str
) -> None:
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, lengths, "sigma1"))
    out, lse = jax_flashmla.mla_decode(
        *data.arrays(),
        softmax_scale=shape.softmax_scale,
        causal=shape.causal,
        implementation=implementation,
    )
    assert checking.judge((out, lse), data, shape).faults == ()
    their_out, their_lse = flash_mla(shape, data, own_metadata=own_metadata)
    assert np.asarray(out).tobytes() == np.asarray(their_out).tobytes()
    expected = jnp.where(jnp.isneginf(lse), jnp.inf, lse).transpose(0, 2, 1)
    np.testing.assert_array_equal(their_lse, expected)


@with_shape
def test_portable_lowering_is_right_here_too(shape: Shape, fit: Fit) -> None:
    shape = fit(shape)
    data = inputs.make_inputs(Case(shape, "ragged", "sigma5"))
    assert checking.judge(checking.decode(shape, data, "xla"), data, shape).faults == ()


def test_batch_of_zero_gives_empty_results(implementation: str) -> None:
    data = inputs.make_inputs(Case(Shape(1, 2, 4, pages=2, pool_pages=4)))
    none = dataclasses.replace(
        data,
        q_latent=data.q_latent[:0],
        q_rope=data.q_rope[:0],
        block_table=data.block_table[:0],
        cache_seqlens=data.cache_seqlens[:0],
    )
    out, lse = jax_flashmla.mla_decode(
        *none.arrays(), softmax_scale=1.0, implementation=implementation
    )
    assert (out.shape, lse.shape) == ((0, 2, 4, 512), (0, 2, 4))


def test_kernel_runs_by_default(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the kernel is the GPU's")
    status = jax_flashmla.status()
    assert (status.path, status.cuda is not None) == ("kernel", True)
    data = inputs.make_inputs(Case(Shape(2, 1, 16, pages=2, pool_pages=4)))
    step = jax.jit(lambda *arrays: jax_flashmla.mla_decode(*arrays, softmax_scale=1.0))
    text = step.lower(*data.arrays()).as_text()
    assert "jax_flashmla_decode" in text
    assert "jax_flashmla_schedule" in text


def test_float32_is_portable_and_says_so(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("no warning where there is no kernel")
    shape = Shape(2, 1, 16, pages=4, pool_pages=16, dtype="float32")
    data = inputs.make_inputs(Case(shape, "ragged", "sigma1"))
    with pytest.warns(UserWarning, match="float32 has no kernel"):
        out, _ = jax_flashmla.mla_decode(*data.arrays(), softmax_scale=shape.softmax_scale)
    exact = np.asarray(checking.exact(data, shape).out, np.float32)
    # XLA may multiply float32 matrices in TF32 on this GPU.
    np.testing.assert_allclose(out, exact, rtol=2e-2, atol=2e-3)
