"""A case from its name to a verdict, on whatever device is there: what the GPU tests call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashmla
from jax_flashmla.testing import cases, compare, device_oracle, inputs, truth

Decoded = tuple[jax.Array, jax.Array]


def check(case: cases.Case, implementation: str | None) -> compare.Verdict:
    """Runs a case into poisoned outputs and holds the result against the device oracle."""
    data = inputs.make_inputs(case)
    return judge(decode(case.shape, data, implementation), data, case.shape)


def decode(shape: cases.Shape, data: inputs.Inputs, implementation: str | None) -> Decoded:
    """Out and lse of the op, compiled once per shape, written over NaN.

    The results take the place of donated arrays of NaN; what the op leaves unwritten stays NaN.
    """
    return _program(shape, implementation)(*_poison(shape), *data.arrays())


def judge(decoded: Decoded, data: inputs.Inputs, shape: cases.Shape) -> compare.Verdict:
    """The verdict over a result for these inputs."""
    return judge_against(decoded, exact(data, shape))


def judge_against(decoded: Decoded, expected: truth.Truth) -> compare.Verdict:
    """The verdict over a result, with everything large staying on the device."""
    with jax.enable_x64(True):
        measured, rows = jax.device_get(_measure(*decoded, expected))
    return compare.judge(compare.Measured(**measured), rows)


def exact(data: inputs.Inputs, shape: cases.Shape) -> truth.Truth:
    """The device oracle's truth for these inputs."""
    q = _join(data.q_latent, data.q_rope)
    rest = data.kv_cache, data.block_table, data.cache_seqlens
    options = {"softmax_scale": shape.softmax_scale, "causal": shape.causal}
    return device_oracle.attend(q, *rest, **options)


@functools.lru_cache(maxsize=8)
def _program(shape: cases.Shape, implementation: str | None) -> jax.stages.Wrapped:
    def step(poison_out: jax.Array, poison_lse: jax.Array, *arrays: jax.Array) -> Decoded:
        del poison_out, poison_lse
        return jax_flashmla.mla_decode(
            *arrays,
            softmax_scale=shape.softmax_scale,
            causal=shape.causal,
            num_sm_parts=shape.num_sm_parts,
            implementation=implementation,
        )

    return jax.jit(step, donate_argnums=(0, 1), keep_unused=True)


def _poison(shape: cases.Shape) -> Decoded:
    rows = shape.batch, shape.s_q, shape.h_q
    return _nans((*rows, cases.HEAD_DIM_V), jnp.dtype(shape.dtype)), _nans(rows, np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nans(dims: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.full(dims, np.nan, dtype)


@jax.jit
def _join(q_latent: jax.Array, q_rope: jax.Array) -> jax.Array:
    return jnp.concatenate([q_latent, q_rope], axis=-1)


@jax.jit
def _measure(
    out: jax.Array, lse: jax.Array, expected: truth.Truth
) -> tuple[dict[str, jax.Array], jax.Array]:
    return compare.measure(jnp, out, lse, expected), (expected.tokens > 0).sum((1, 2))


def fill_free_memory(device: jax.Device, piece: int = 2**28) -> int:
    """Writes NaN over the device memory that the next results and workspaces come from.

    The allocator hands out the front of its free memory first: the larger part of it is enough,
    and asking for all of it could fail, as it may be in pieces.

    Args:
        device: where.
        piece: bytes per array.

    Returns:
        Bytes written; 0 where the device does not tell how much is free.
    """
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    held = [_nans((piece // 4,), np.float32) for _ in range(int(0.6 * free / piece))]
    jax.block_until_ready(held)
    return sum(array.nbytes for array in held)
