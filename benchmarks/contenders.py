"""What is timed: a chain of calls in one jit, through our op or through what XLA offers.

``out`` [b, s_q, h_q, 512] is the next call's ``q_latent``: the chain is a true dependency, so
nothing is dead, merged or run side by side, and costs no operation of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from workload import ROTATED_BYTES, SOFTMAX_SCALE, Inputs, Row

from jax_flashmla import mla_decode
from jax_flashmla._roofline import H200

# (q_latent, q_rope, kv_cache, block_table, cache_seqlens, schedule) -> out
Attend = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Chain:
    """A compiled chain and what it runs on; calling it maps ``q_latent`` to the last ``out``.

    Attributes:
        compiled: The function of `chained`, compiled.
        calls: Calls per run.
        inputs: Queries, lengths, schedule.
        kv_cache: The pool.
        turns: Endless: the KV sets of the next run.
    """

    compiled: jax.stages.Compiled
    calls: int
    inputs: Inputs
    kv_cache: jax.Array
    turns: Iterator[tuple[jax.Array, ...]]

    def __call__(self, q_latent: jax.Array) -> jax.Array:
        """Starts a run."""
        given, tables = self.inputs, next(self.turns)
        return self.compiled(
            q_latent, given.q_rope, self.kv_cache, tables, given.cache_seqlens, given.schedule
        )


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compute the op.

    Attributes:
        name: As it appears in results.
        attend: One call.
        min_calls: Calls per jit at least,
        max_calls: at most,
        run_bytes: and in between as many as touch this many KV bytes.
        run_seconds: No more calls than take that long at the hardware's floor, but two.
    """

    name: str
    attend: Attend
    min_calls: int
    max_calls: int
    run_bytes: float
    run_seconds: float = math.inf

    def calls(self, row: Row) -> int:
        """Calls in one run of the compiled chain; more KV sets than that take several runs."""
        short = self.run_seconds / row.work.floor_seconds(H200)
        least = int(min(self.min_calls, max(2, short)))
        return max(least, min(self.max_calls, round(self.run_bytes / row.work.kv_bytes)))

    def compile(self, row: Row, inputs: Inputs, kv_cache: jax.Array) -> Chain:
        """Compiles a chain of calls; ``q_latent`` is donated, so that addresses never change."""
        calls = self.calls(row)

        starts = range(0, len(inputs.tables), calls)
        groups = [inputs.tables[start : start + calls] for start in starts]
        groups = [group for group in groups if len(group) == len(groups[0])]
        jitted = jax.jit(chained(self.attend, calls), donate_argnums=0)
        rest = (inputs.cache_seqlens, inputs.schedule)
        lowered = jitted.lower(inputs.q_latent, inputs.q_rope, kv_cache, groups[0], *rest)
        return Chain(lowered.compile(), calls, inputs, kv_cache, itertools.cycle(groups))


def chained(attend: Attend, calls: int) -> Callable[..., jax.Array]:
    """The function of a chain: ``calls`` calls, each fed with the output of the one before."""

    def run(
        q_latent: jax.Array,
        q_rope: jax.Array,
        kv_cache: jax.Array,
        tables: tuple[jax.Array, ...],
        cache_seqlens: jax.Array,
        schedule: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        for table in itertools.islice(itertools.cycle(tables), calls):
            q_latent = attend(q_latent, q_rope, kv_cache, table, cache_seqlens, schedule)
        return q_latent

    return run


def ours(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    schedule: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """jax_flashmla, with the schedule made beforehand."""
    out, _ = mla_decode(
        q_latent,
        q_rope,
        kv_cache,
        block_table,
        cache_seqlens,
        softmax_scale=SOFTMAX_SCALE,
        schedule=schedule,
    )
    return out


def gather_einsum(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    schedule: tuple[jax.Array, jax.Array],  # noqa: ARG001  (every contender gets the same)
) -> jax.Array:
    """What JAX users have today: gather the pages, two einsums with a mask between, all XLA.

    bf16 operands, float32 logits and softmax, bf16 weights; the pages of all requests are padded
    to the longest one.
    """
    b, s_q, _, head_dim_v = q_latent.shape
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    keys = kv_cache[block_table].reshape(b, -1, q.shape[-1])  # [b, tokens, 576]
    logits = jnp.einsum("bshd,btd->bsht", q, keys, preferred_element_type=jnp.float32)
    limits = cache_seqlens[:, None] - (s_q - 1 - jnp.arange(s_q))  # [b, s_q]
    seen = jnp.arange(keys.shape[1]) < limits[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits * SOFTMAX_SCALE, -jnp.inf), axis=-1)
    return jnp.einsum("bsht,btd->bshd", weights.astype(q.dtype), keys[..., :head_dim_v])


# Enough calls to leave nothing of a KV set in L2, to hide the start of a run, and to become a
# command buffer (XLA wants five operations); but a run is no longer than half a turn, or the card
# is at its power limit before the turn begins.
OURS = Contender(
    "jax_flashmla", ours, min_calls=8, max_calls=128, run_bytes=ROTATED_BYTES, run_seconds=0.01
)
# Few: XLA compiles and tunes each call of a chain, and may gather for all of them at once.
XLA = Contender("xla gather + einsum", gather_einsum, min_calls=1, max_calls=4, run_bytes=1e9)
