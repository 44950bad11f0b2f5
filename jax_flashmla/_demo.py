"""Decode steps over batches from a trace: the pool, the step, its time and its check."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_flashmla._api import get_mla_metadata, mla_decode
from jax_flashmla._roofline import HEAD_DIM_QK, HEAD_DIM_V, Work
from jax_flashmla._timing import Seconds, time_steps
from jax_flashmla.testing import compare, oracle
from jax_flashmla.trace import PAGE_SIZE, Moment

KEY_SIGMA = 0.1
# DeepSeek-V3's: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * mscale ** 2.
SOFTMAX_SCALE = 192**-0.5 * 1.3688879454113936**2
GPU_MEMORY_SHARE, HOST_MEMORY_SHARE = 0.6, 0.2
CHECKED_HEADS = 2


class LastLayer(NamedTuple):
    """What the last layer of a step took and gave, for the check."""

    q_rope: jax.Array  # [b, 1, h_q, 64]
    out: jax.Array  # [b, 1, h_q, 512]
    lse: jax.Array  # [b, 1, h_q]


State = tuple[jax.Array, LastLayer | None]  # q_rope of the next step, last layer of the one before


@dataclasses.dataclass(frozen=True)
class Model:
    """Layers that share one flat pool, and the queries of a full batch.

    Attributes:
        kv_cache: [layers · num_pages, 64, 1, 576]; layer l owns pages l · num_pages and up.
        q_latent: [b, 1, h_q, 512].
        q_rope: [b, 1, h_q, 64].
        num_pages: Of one layer.
        max_pages_per_seq: Columns of a full block table.
    """

    kv_cache: jax.Array
    q_latent: jax.Array
    q_rope: jax.Array
    num_pages: int
    max_pages_per_seq: int

    @property
    def layers(self) -> int:
        """How many layers the pool holds."""
        return self.kv_cache.shape[0] // self.num_pages


@dataclasses.dataclass(frozen=True)
class Result:
    """One moment, measured and checked.

    Attributes:
        moment: The batch.
        work: Bytes and FLOP of one layer.
        per_layer: Seconds per layer.
        error: Root mean square error against float64, in units of an ideal kernel's.
        faults: What is wrong with the result, empty if nothing.
    """

    moment: Moment
    work: Work
    per_layer: Seconds
    error: float
    faults: tuple[str, ...]


def layers_that_fit(num_pages: int, dtype: DTypeLike) -> int:
    """Layers of ``num_pages`` pages that fit into this device's memory beside all else."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        room = GPU_MEMORY_SHARE * stats["bytes_limit"]
    else:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        room = HOST_MEMORY_SHARE * host
    return int(room // (num_pages * PAGE_SIZE * HEAD_DIM_QK * jnp.dtype(dtype).itemsize))


def make_model(
    moments: Sequence[Moment], *, layers: int, h_q: int, dtype: DTypeLike, seed: int
) -> Model:
    """Random normal keys and queries, enough for the largest of these batches.

    Keys, which are values too, have the size that FlashMLA's absolute tolerance is meant for, and
    queries are as much larger: the logits are those of standard normal keys and queries.
    """
    num_pages = max(moment.num_pages for moment in moments)
    batch = max(len(moment.cache_seqlens) for moment in moments)

    def normal(key: jax.Array, sigma: float, *shape: int) -> jax.Array:
        return (sigma * jax.random.normal(key, shape)).astype(dtype)

    @jax.jit
    def pool(key: jax.Array) -> jax.Array:
        def layer(key: jax.Array) -> jax.Array:
            return normal(key, KEY_SIGMA, num_pages, PAGE_SIZE, 1, HEAD_DIM_QK)

        stacked = jax.lax.map(layer, jax.random.split(key, layers))
        return stacked.reshape(-1, *stacked.shape[2:])

    keys = jax.random.split(jax.random.key(seed), 3)
    return Model(
        pool(keys[0]),
        normal(keys[1], 1 / KEY_SIGMA, batch, 1, h_q, HEAD_DIM_V),
        normal(keys[2], 1 / KEY_SIGMA, batch, 1, h_q, HEAD_DIM_QK - HEAD_DIM_V),
        num_pages,
        max(moment.block_table.shape[1] for moment in moments),
    )


Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], State]


def compile_step(model: Model) -> Step:
    """One decode step, compiled for a full batch.

    It schedules once and runs all layers on that schedule. Each layer's output goes into the next
    layer's ``q_rope``, so none of them is dead or can run early.
    """

    def step(
        q_rope: jax.Array,
        q_latent: jax.Array,
        kv_cache: jax.Array,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
    ) -> State:
        batch, _, h_q, rope = q_rope.shape
        schedule = get_mla_metadata(cache_seqlens, h_q, 1)
        first = q_rope
        for layer in range(model.layers):
            taken = q_rope
            out, lse = mla_decode(
                q_latent,
                taken,
                kv_cache,
                block_table + layer * model.num_pages,
                cache_seqlens,
                softmax_scale=SOFTMAX_SCALE,
                schedule=schedule,
            )
            q_rope = first + out.reshape(batch, 1, h_q, -1, rope).mean(axis=3)
        return q_rope, LastLayer(taken, out, lse)

    batch = model.q_rope.shape[0]
    table = jax.ShapeDtypeStruct((batch, model.max_pages_per_seq), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    arguments = (model.q_rope, model.q_latent, model.kv_cache, table, lengths)
    return jax.jit(step).lower(*arguments).compile()


def run_moment(model: Model, step: Step, moment: Moment, *, repeats: int, seconds: float) -> Result:
    """Checks the last layer of one step and times the step."""
    batch, _, h_q, _ = model.q_rope.shape
    padded = moment.padded(batch, model.max_pages_per_seq)
    table, lengths = jnp.asarray(padded.block_table), jnp.asarray(padded.cache_seqlens)

    def run(state: State) -> State:
        return step(state[0], model.q_latent, model.kv_cache, table, lengths)

    start: State = (model.q_rope, None)
    verdict = _check(model, moment, run(start)[1])
    taken, _ = time_steps(run, start, repeats=repeats, seconds=seconds)
    requests, itemsize = len(moment.cache_seqlens), model.q_rope.dtype.itemsize
    work = Work(moment.tokens, moment.unique_tokens, requests, 1, h_q, itemsize)
    return Result(moment, work, taken.per(model.layers), verdict.ratio, verdict.faults)


def _check(model: Model, moment: Moment, last: LastLayer) -> compare.Verdict:
    """Holds two heads of the longest and the shortest request against float64."""
    lengths = moment.cache_seqlens
    requests = sorted({int(lengths.argmax()), int(lengths.argmin())})
    h_q = model.q_rope.shape[2]
    heads = np.linspace(0, h_q - 1, min(CHECKED_HEADS, h_q)).astype(int)
    some = np.ix_(requests, [0], heads)
    q = np.concatenate([np.asarray(model.q_latent)[some], np.asarray(last.q_rope)[some]], axis=-1)

    table = moment.block_table[requests]
    pages, local = np.unique(np.maximum(table, 0), return_inverse=True)
    fetched = model.kv_cache[jnp.asarray(pages + (model.layers - 1) * model.num_pages)]
    truth = oracle.attend(
        q,
        np.asarray(fetched),
        local.reshape(table.shape),
        lengths[requests],
        softmax_scale=SOFTMAX_SCALE,
        causal=True,
    )
    return compare.compare(np.asarray(last.out)[some], np.asarray(last.lse)[some], truth)
