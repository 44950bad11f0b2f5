"""The layer over a mesh axis: heads of the projections and pages of the cache are divided.

The functions of `jax_flashmla.mla` by the same names, for use inside `jax.shard_map`. Each device
has its share of the heads' weights (`weight_specs`) and its pages of every request, page p on
device `p % n` (`jax_flashmla.context_parallel`). All have the same hidden states. What is cached is
projected on every device and written on the one that holds its page; queries of all heads are
gathered for decode, latents of all pages for prefill; the heads' shares of the result are summed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flashmla import context_parallel
from jax_flashmla._direct_exchange import Mailboxes
from jax_flashmla._dispatch import Implementation
from jax_flashmla._exchange import Exchange
from jax_flashmla._manual_axes import gather
from jax_flashmla.mla import layer
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.prefill import attend
from jax_flashmla.mla.step import Step, describe
from jax_flashmla.mla.step import prefill_step as _own_prefill_step
from jax_flashmla.mla.weights import MLAWeights
from jax_flashmla.schedule import Schedule


class ContextStep(NamedTuple):
    """One step of a batch on one device, made once and given to all layers.

    Attributes:
        own: table and slots of this device's pages; lengths and rotations of the whole requests.
        schedules: of decode; None in prefill.
        mailboxes: of a direct exchange, else None.
    """

    own: Step
    schedules: tuple[Schedule, ...] | None = None
    mailboxes: Mailboxes | None = None

    def at_layer(self, layer: int | jax.Array, num_pages: int) -> "ContextStep":
        """The step for one layer's share of a flat pool, `num_pages` pages of `cache.make_pool`."""
        return self._replace(own=self.own.at_layer(layer, num_pages))


def weight_specs(axis_name: str) -> MLAWeights:
    """Says how a layer's weights are sharded: by heads, where they have any."""
    heads_first, whole = PartitionSpec(axis_name), PartitionSpec()
    return MLAWeights(
        down=whole,
        down_bias=whole,
        query_norm=whole,
        query_up=PartitionSpec(None, axis_name),
        latent_norm=whole,
        key_up=heads_first,
        value_up=heads_first,
        output=heads_first,
        output_bias=whole,
    )


def shard_weights(weights: MLAWeights, mesh: Mesh, axis_name: str) -> MLAWeights:
    """Puts a layer's weights on a mesh, sharded as `weight_specs` says.

    Raises:
        ValueError: the axis is unknown, or its devices cannot share the heads evenly.
    """
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"axis_name: got {axis_name!r}, expected one of {list(mesh.axis_names)}, the axes of"
            " the mesh"
        )
    heads, n = weights.key_up.shape[0], mesh.shape[axis_name]
    if heads % n:
        raise ValueError(f"weights: got {heads} heads, expected a multiple of the {n} devices")
    placed = {
        name: x if x is None else jax.device_put(x, NamedSharding(mesh, spec))
        for (name, x), spec in zip(weights._asdict().items(), weight_specs(axis_name), strict=True)
    }
    return MLAWeights(**placed)


def decode_step(
    config: MLAConfig,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    slots: jax.Array,
    *,
    axis_name: str,
    exchange: Exchange = "gather",
) -> ContextStep:
    """Describes a step of s_q new tokens per request, as `mla.decode_step` does.

    Args:
        config: of the model, with all heads.
        block_table: int32 `[b, max_pages_per_seq]`, this device's, of `split_block_table` or of an
            allocator of its own.
        cache_seqlens: int32 `[b]`, tokens of each request on all devices together, with the new
            ones.
        slots: int32 `[b, s_q]`, where this device writes new tokens, of `split_slots`.
        axis_name: the mesh axis.
        exchange: as in `mla_decode_context_parallel`; the same for `decode`.

    Raises:
        ValueError: a shape is wrong; the axis is unknown.
        TypeError: a dtype is wrong.
    """
    own = describe(config, block_table, cache_seqlens, slots)
    counts = {"s_q": slots.shape[1], "h_q": config.num_attention_heads}
    schedules = context_parallel.get_schedules(
        own.block_table, own.cache_seqlens, axis_name=axis_name, **counts
    )
    boxes = None
    if exchange == "direct":
        batch = own.block_table.shape[0]
        boxes = context_parallel.get_mailboxes(axis_name=axis_name, b=batch, **counts)
    return ContextStep(own, schedules, boxes)


def prefill_step(
    config: MLAConfig,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    query_lens: jax.Array,
    slots: jax.Array,
) -> ContextStep:
    """Describes a step of up to s_q new tokens per request, as `mla.prefill_step` does.

    Args:
        config: of the model, with all heads.
        block_table: as in `decode_step`.
        cache_seqlens: as in `decode_step`.
        query_lens: int32 `[b]`, new tokens, at most s_q and `cache_seqlens`.
        slots: as in `decode_step`, -1 behind the last new token too.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    return ContextStep(_own_prefill_step(config, block_table, cache_seqlens, query_lens, slots))


def decode(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: ContextStep,
    *,
    axis_name: str,
    exchange: Exchange = "gather",
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one layer on the newest s_q tokens of each request, as `mla.decode` does.

    Args:
        weights: this device's share of the layer's.
        config: of the model, with all heads.
        x: normalised hidden states `[b, s_q, hidden]`, the same on all devices.
        pool: this device's page pool `[num_pages, 64, 1, 576]`; donate it.
        step: of `decode_step`.
        axis_name: the mesh axis.
        exchange: as in `mla_decode_context_parallel`.
        implementation: as in `mla_decode`.

    Returns:
        `[b, s_q, hidden]`, the same on all devices, and this device's pool.

    Raises:
        ValueError: a shape is wrong, or the step comes from `prefill_step`.
        TypeError: a dtype is wrong.
    """
    if step.schedules is None:
        raise ValueError("step: got one without schedules, expected that of decode_step")
    *own, pool = layer.absorbed_and_append(
        weights, config, x, pool, step.own, implementation=implementation
    )
    queries = (gather(q, axis_name, 2) for q in own)
    out, _ = context_parallel.mla_decode_context_parallel(
        *queries,
        pool,
        step.own.block_table,
        step.own.cache_seqlens,
        axis_name=axis_name,
        softmax_scale=config.softmax_scale,
        exchange=exchange,
        own_heads=True,
        schedules=step.schedules,
        mailboxes=step.mailboxes,
        implementation=implementation,
    )
    return _sum_of_heads(layer.project_back, weights, out, axis_name), pool


def prefill(
    weights: MLAWeights,
    config: MLAConfig,
    x: jax.Array,
    pool: jax.Array,
    step: ContextStep,
    *,
    axis_name: str,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one layer on up to s_q new tokens of each request, as `mla.prefill` does.

    Keys come from all devices a block at a time, for this device's heads.

    Args:
        weights: as in `decode`.
        config: as in `decode`.
        x: as in `decode`.
        pool: as in `decode`.
        step: of `prefill_step`.
        axis_name: the mesh axis.
        implementation: as in `mla_decode`, for the cache operations.

    Returns:
        As `decode`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    q_nope, q_rope, pool = layer.project_and_append(
        weights, config, x, pool, step.own, implementation=implementation
    )
    out, _ = attend(
        *(weights, config, q_nope, q_rope, pool, step.own),
        axis_name=axis_name,
        implementation=implementation,
    )
    return _sum_of_heads(layer.project_out, weights, out, axis_name), pool


def _sum_of_heads(
    project: Callable[[MLAWeights, jax.Array], jax.Array],
    weights: MLAWeights,
    out: jax.Array,
    axis_name: str,
) -> jax.Array:
    """Projects each device's heads and sums up; the output's bias belongs to the sum, once."""
    y = jax.lax.psum(project(weights._replace(output_bias=None), out), axis_name)
    return y if weights.output_bias is None else y + weights.output_bias.reshape(1, 1, -1)
