"""What all layers of one step share: tables, lengths, slots, rotations, schedule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flashmla import _shapes
from jax_flashmla._api import get_mla_metadata
from jax_flashmla.cache import layer_block_table, layer_slots
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.rope_table import cos_sin
from jax_flashmla.schedule import Schedule


class Step(NamedTuple):
    """One step of a batch, made once by `decode_step` or `prefill_step` and given to all layers.

    Attributes:
        block_table: int32 `[b, max_pages_per_seq]`.
        cache_seqlens: int32 `[b]`, cached tokens with the new ones.
        query_lens: int32 `[b]`, how many of the s_q rows of a request are tokens.
        slots: int32 `[b, s_q]`, where each new token goes, -1 for none.
        cos: float32 `[b, s_q, 32]`.
        sin: float32 `[b, s_q, 32]`.
        schedule: of the decode kernel; None in prefill.
    """

    block_table: jax.Array
    cache_seqlens: jax.Array
    query_lens: jax.Array
    slots: jax.Array
    cos: jax.Array
    sin: jax.Array
    schedule: Schedule | None = None

    def at_layer(self, layer: int | jax.Array, num_pages: int) -> "Step":
        """The step for one layer's share of a flat pool, `num_pages` pages of `cache.make_pool`."""
        return self._replace(
            block_table=layer_block_table(self.block_table, layer, num_pages),
            slots=layer_slots(self.slots, layer, num_pages),
        )


def decode_step(
    config: MLAConfig, block_table: jax.Array, cache_seqlens: jax.Array, slots: jax.Array
) -> Step:
    """Describes a step of s_q new tokens per request, one or a few (MTP).

    The new tokens are the last s_q of a request: query j stands at position
    `cache_seqlens - s_q + j`. A row that pads the batch has slots of -1 and length 0.

    Args:
        config: of the model.
        block_table: int32 `[b, max_pages_per_seq]`, with the pages of the new tokens.
        cache_seqlens: int32 `[b]`, tokens with the new ones.
        slots: int32 `[b, s_q]`, `page * 64 + offset` of the new tokens.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    step = describe(config, block_table, cache_seqlens, slots)
    rows = max(1, slots.shape[1]) * config.num_attention_heads
    return step._replace(schedule=get_mla_metadata(step.cache_seqlens, rows, 1))


def prefill_step(
    config: MLAConfig,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    query_lens: jax.Array,
    slots: jax.Array,
) -> Step:
    """Describes a step of up to s_q new tokens per request, behind whatever is cached already.

    Query j of a request stands at position `cache_seqlens - query_lens + j`; the rows from
    `query_lens` on are padding.

    Args:
        config: of the model.
        block_table: int32 `[b, max_pages_per_seq]`, with the pages of the new tokens.
        cache_seqlens: int32 `[b]`, tokens with the new ones.
        query_lens: int32 `[b]`, new tokens, at most s_q and `cache_seqlens`.
        slots: int32 `[b, s_q]`, `page * 64 + offset` of the new tokens, -1 behind the last.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    arrays = _checked(block_table, cache_seqlens, slots)
    (query_lens,) = _shapes.as_arrays(query_lens=query_lens)
    _shapes.check_shape("query_lens", query_lens, arrays[1].shape)
    _shapes.check_dtype("query_lens", query_lens, jnp.int32)
    return _step(config, *arrays, query_lens)


def describe(
    config: MLAConfig, block_table: jax.Array, cache_seqlens: jax.Array, slots: jax.Array
) -> Step:
    """What `decode_step` describes, without a schedule."""
    arrays = _checked(block_table, cache_seqlens, slots)
    return _step(config, *arrays, jnp.full_like(arrays[1], slots.shape[1]))


def positions(cache_seqlens: jax.Array, query_lens: jax.Array, s_q: int) -> jax.Array:
    """Where each query stands in its request, int32 `[b, s_q]`; padding rows stand anywhere."""
    return (cache_seqlens - query_lens)[:, None] + jnp.arange(s_q, dtype=jnp.int32)[None]


def _checked(
    block_table: jax.Array, cache_seqlens: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = _shapes.as_arrays(block_table=block_table, cache_seqlens=cache_seqlens, slots=slots)
    batch = _shapes.check_seqlens(arrays[1])
    _shapes.check_shape("block_table", arrays[0], (batch, "max_pages_per_seq"))
    _shapes.check_shape("slots", arrays[2], (batch, "s_q"))
    for name, array in (("block_table", arrays[0]), ("slots", arrays[2])):
        _shapes.check_dtype(name, array, jnp.int32)
    return arrays


def _step(
    config: MLAConfig,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    slots: jax.Array,
    query_lens: jax.Array,
) -> Step:
    cos, sin = cos_sin(config, positions(cache_seqlens, query_lens, slots.shape[1]))
    return Step(block_table, cache_seqlens, query_lens, slots, cos, sin)
