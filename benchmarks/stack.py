"""A stack of MLA layers, as a model has them: shapes, rows, weights, pool, one decode step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import workload
from contenders import gather_einsum

from jax_flashmla import cache, mla
from jax_flashmla._roofline import Ceilings, Work
from jax_flashmla.mla import layer

PAGE_SIZE = 64
POOL_BYTES = 80e9  # with 23 GB of weights and what XLA needs this fits 141 GB
TILE_PAGES = 512  # of random numbers; the pool repeats them
YARN = mla.Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)


@dataclasses.dataclass(frozen=True)
class Model:
    """The attention of a model.

    Attributes:
        name: As rows name it.
        layers: How many.
        config: Of each.
    """

    name: str
    layers: int
    config: mla.MLAConfig


MODELS = (
    Model("v3", 61, mla.MLAConfig(7168, 128, 128, 128, q_lora_rank=1536, yarn=YARN)),
    Model("v2lite", 27, mla.MLAConfig(2048, 16, 128, 128, yarn=YARN)),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: a model, a batch, and how requests share pages.

    Attributes:
        model: Its attention.
        batch: Requests.
        seqlen: Cached tokens of each, with the new one.
    """

    model: Model
    batch: int
    seqlen: int

    @property
    def name(self) -> str:
        """Such as v3/128x4096."""
        return f"{self.model.name}/{self.batch}x{self.seqlen}"

    @property
    def pages(self) -> int:
        """Pages of each request."""
        return -(-self.seqlen // PAGE_SIZE)

    @property
    def sharers(self) -> int:
        """Requests that have the same pages, 1 where the pool has room for all."""
        count = 1
        while self.pool_bytes(count) > POOL_BYTES:
            count *= 2
        return count

    @property
    def num_pages(self) -> int:
        """Pages of one layer's share of the pool; one per request besides, for the new token."""
        return self.batch // self.sharers * self.pages + (self.batch if self.sharers > 1 else 0)

    @property
    def work(self) -> Work:
        """Bytes and FLOP of the attention of one layer."""
        tokens = self.batch * self.seqlen
        return Work(
            tokens, tokens // self.sharers, self.batch, 1, self.model.config.num_attention_heads
        )

    def pool_bytes(self, sharers: int) -> float:
        """Bytes of the pool of all layers when so many requests share pages."""
        rows = self.batch / sharers * self.pages * PAGE_SIZE
        return rows * (512 + 64) * 2 * self.model.layers

    def weight_floor_seconds(self, ceilings: Ceilings) -> float:
        """Least time to read the weights of all layers once."""
        shapes = jax.eval_shape(lambda: random_layer(self.model.config, jax.random.key(0)))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        return self.model.layers * size / ceilings.bytes_per_s

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """Least time of the attention of all layers and of reading their weights."""
        attention = self.model.layers * self.work.floor_seconds(ceilings)
        return attention + self.weight_floor_seconds(ceilings)

    def shrunk(self) -> "Row":
        """The same row small enough for a CPU."""
        small = dataclasses.replace(
            self.model.config,
            hidden_size=64,
            num_attention_heads=2,
            qk_nope_head_dim=16,
            v_head_dim=16,
            q_lora_rank=self.model.config.q_lora_rank and 32,
        )
        return Row(Model(self.model.name, 3, small), min(self.batch, 3), min(self.seqlen, 130))


def load_rows(patterns: str = "*") -> list[Row]:
    """The rows whose names match one of the comma-separated patterns."""
    rows = [
        Row(model, batch, seqlen)
        for model in MODELS
        for seqlen in (4096, 32768)
        for batch in (1, 32, 128)
    ]
    return [row for row in rows if workload.matches(row.name, patterns)]


class Layer(NamedTuple):
    """One layer's weights: the norm before attention, and attention."""

    norm: jax.Array  # [hidden]
    attention: mla.MLAWeights


def random_layer(config: mla.MLAConfig, key: jax.Array) -> Layer:
    """Random weights in bfloat16, sized so that every product keeps its input's magnitude."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    keys = iter(jax.random.split(key, 8))

    def product(contracted: int, *shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) * contracted**-0.5

    rank, width = config.q_lora_rank or 0, config.q_lora_rank or hidden
    attention = mla.MLAWeights(
        down=product(hidden, hidden, rank + 576),
        down_bias=None,
        query_norm=jnp.ones(rank, jnp.bfloat16) if rank else None,
        query_up=product(width, width, heads, config.qk_head_dim),
        latent_norm=jnp.ones(512, jnp.bfloat16),
        key_up=product(512, heads, config.qk_nope_head_dim, 512),
        value_up=product(512, heads, 512, config.v_head_dim),
        output=product(heads * config.v_head_dim, heads, config.v_head_dim, hidden),
        output_bias=None,
    )
    return Layer(jnp.ones(hidden, jnp.bfloat16), attention)


def random_layers(model: Model) -> tuple[Layer, ...]:
    """The weights of all layers."""
    make = jax.jit(lambda key: random_layer(model.config, key))
    return tuple(make(key) for key in jax.random.split(jax.random.key(1), model.layers))


def make_pool(row: Row) -> jax.Array:
    """The flat pool `[layers * num_pages, 64, 1, 576]`, full of random tokens."""
    total = row.model.layers * row.num_pages

    def make() -> jax.Array:
        shape = (TILE_PAGES, PAGE_SIZE, 1, 576)
        tile = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        return tile[jnp.arange(total) % TILE_PAGES]

    return jax.jit(make)()


def tables(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block table, lengths and slots; the new token of each request has a place of its own.

    Requests that share pages share all but the last one.
    """
    shared = row.batch // row.sharers * row.pages
    order = np.random.default_rng(1).permutation(shared).astype(np.int32).reshape(-1, row.pages)
    table = order[np.arange(row.batch) // row.sharers]
    if row.sharers > 1:
        table[:, -1] = shared + np.arange(row.batch)
    lengths = np.full(row.batch, row.seqlen, np.int32)
    return table, lengths, table[:, -1:] * PAGE_SIZE + (row.seqlen - 1) % PAGE_SIZE


# (weights, config, x, pool, step) -> (y, pool)
Attention = Callable[..., tuple[jax.Array, jax.Array]]


def gather_attention(
    weights: mla.MLAWeights, config: mla.MLAConfig, x: jax.Array, pool: jax.Array, step: mla.Step
) -> tuple[jax.Array, jax.Array]:
    """`mla.decode` with what JAX users have today in the place of append and kernel."""
    *q, pool = layer.absorbed_and_append(weights, config, x, pool, step, implementation="xla")
    out = gather_einsum(*q, pool, step.block_table, step.cache_seqlens, None)
    return layer.project_back(weights, out), pool


def _one_layer(
    attention: Attention,
    model: Model,
    weights: Layer,
    here: mla.Step,
    x: jax.Array,
    pool: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Norm, attention and residual; returns the new hidden states and pool."""
    normed = mla.rms_norm(x, weights.norm, model.config.rms_norm_eps)
    y, pool = attention(weights.attention, model.config, normed, pool, here)
    return x + y, pool


def unrolled(attention: Attention, model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One decode step through all layers, one after the other in the program."""

    def run(
        x: jax.Array,
        pool: jax.Array,
        layers: Sequence[Layer],
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        slots: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        step = mla.decode_step(model.config, block_table, cache_seqlens, slots)
        num_pages = pool.shape[0] // model.layers
        for i, weights in enumerate(layers):
            x, pool = _one_layer(attention, model, weights, step.at_layer(i, num_pages), x, pool)
        # Normalised, the next step can begin with it.
        return mla.rms_norm(x, jnp.ones_like(x[0, 0]), 1e-6), pool

    return run


def scanned(attention: Attention, model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The same as a scan over stacked weights."""

    def run(
        x: jax.Array,
        pool: jax.Array,
        layers: Layer,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        slots: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        step = mla.decode_step(model.config, block_table, cache_seqlens, slots)
        num_pages = pool.shape[0] // model.layers

        def body(carry: tuple, numbered: tuple) -> tuple:
            (x, pool), (i, weights) = carry, numbered
            here = step.at_layer(i, num_pages)
            return _one_layer(attention, model, weights, here, x, pool), None

        numbers = jnp.arange(model.layers, dtype=jnp.int32)
        (x, pool), _ = jax.lax.scan(body, (x, pool), (numbers, layers))
        return mla.rms_norm(x, jnp.ones_like(x[0, 0]), 1e-6), pool

    return run


def attention_alone(model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernels of the step without the rest: schedule once, one call per layer, chained."""

    def run(
        q_latent: jax.Array,
        pool: jax.Array,
        q_rope: jax.Array,
        block_table: jax.Array,
        cache_seqlens: jax.Array,
        slots: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        step = mla.decode_step(model.config, block_table, cache_seqlens, slots)
        num_pages = pool.shape[0] // model.layers
        for i in range(model.layers):
            table = cache.layer_block_table(step.block_table, i, num_pages)
            q_latent, _ = layer.mla_decode(
                q_latent,
                q_rope,
                pool,
                table,
                cache_seqlens,
                softmax_scale=model.config.softmax_scale,
                schedule=step.schedule,
            )
        return q_latent, pool

    return run
