"""The attention in one call on whole arrays, and the ways in which it may be sharded."""

import dataclasses
from typing import Any, NamedTuple

import jax
import mesh_calls
import numpy as np
from attention_cases import SMALL, place, random_weights
from jax import P
from mesh_calls import BOTH, DATA, MODEL, NONE, Arrays, Call

from jax_flashmla import get_mla_metadata
from jax_flashmla._absorbed_attention import Operands, Static, absorbed_attention

HEADS, PAGES = 8, 8  # pages of each of the devices that the batch is divided among
LENGTHS = [70, 130, 0, 1]
STATIC = Static(softmax_scale=0.1, norm_eps=1e-6, interleave=True, implementation=None)


def attend(*arrays: jax.Array) -> Arrays:
    """Takes all operands but the schedule, which is that of the tables given."""
    lengths = arrays[-1]
    schedule = get_mla_metadata(lengths, HEADS, 1, num_sm_parts=3)
    return absorbed_attention(Operands(*arrays, *schedule), STATIC)


class Given(NamedTuple):
    """The operands but for the schedule, or how each is sharded."""

    source: Any
    query_up: Any
    key_up: Any
    side: Any
    latent_norm: Any
    cos: Any
    sin: Any
    slots: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any


def arrays(name: str, dtype: str = "float32", *, shared: bool, s_q: int = 1) -> Given:
    """Operands of a model; a pool that is not shared has pages for each half of the batch."""
    config = dataclasses.replace(SMALL[name], num_attention_heads=HEADS)
    weights, low_rank = random_weights(config, dtype), config.q_lora_rank is not None
    groups = [LENGTHS] if shared else [LENGTHS[:2], LENGTHS[2:]]
    tables, lengths, slots = zip(*(place(group, s_q, PAGES) for group in groups), strict=True)
    width = max(table.shape[1] for table in tables)
    tables = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in tables]
    columns = config.q_lora_rank + 576 if low_rank else config.hidden_size
    rows = len(LENGTHS), s_q
    made = Given(
        source=mesh_calls.normal(dtype, *rows, columns),
        query_up=weights.query_up,
        key_up=weights.key_up,
        side=weights.query_norm if low_rank else weights.down,
        latent_norm=weights.latent_norm,
        cos=mesh_calls.normal("float32", *rows, 32),
        sin=-mesh_calls.normal("float32", *rows, 32),
        slots=np.concatenate(slots),
        kv_cache=mesh_calls.normal(dtype, len(groups) * PAGES, 64, 1, 576),
        block_table=np.concatenate(tables),
        cache_seqlens=np.concatenate(lengths),
    )
    return Given(*map(np.asarray, made))


def whole(given: Given, *, shared: bool) -> Given:
    """The operands of one device, where slots and table name pages of the whole pool."""
    if shared:
        return given
    first = PAGES * np.repeat(np.int32([0, 1]), len(LENGTHS) // 2)[:, None]
    slots = np.where(given.slots < 0, given.slots, given.slots + 64 * first)
    table = np.where(given.block_table < 0, given.block_table, given.block_table + first)
    return given._replace(slots=slots, block_table=table)


def specs(batch: P = NONE, heads: str | None = None) -> Given:
    """The pool is divided as the batch is."""
    return Given(
        source=batch,
        query_up=P(None, heads),
        key_up=P(heads),
        side=NONE,
        latent_norm=NONE,
        cos=batch,
        sin=batch,
        slots=batch,
        kv_cache=batch,
        block_table=batch,
        cache_seqlens=batch,
    )


SHARDED: dict[str, tuple[Given, tuple[P, P]]] = {
    "batch with its pages": (specs(DATA), (DATA, DATA)),
    "heads, the pool whole": (specs(heads="model"), (MODEL, NONE)),
    "batch and heads": (specs(DATA, "model"), (BOTH, DATA)),
}


def call_of(name: str, sharded: str, **options: object) -> tuple[Call, Arrays]:
    """The call, and the result of one device."""
    in_specs, out_specs = SHARDED[sharded]
    shared = in_specs.kv_cache == NONE
    given = arrays(name, shared=shared, **options)
    expected = jax.jit(attend)(*whole(given, shared=shared))
    return Call(attend, tuple(given), tuple(in_specs), out_specs), expected
