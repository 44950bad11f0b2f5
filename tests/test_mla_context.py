"""The layer over a mesh axis: what one device computes, whatever is divided."""

import functools
import math
import re

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashmla import cache, context_parallel, mla
from jax_flashmla.mla import context
from jax_flashmla.pages import PagePool

HF = dense_stack.hf_config("deepseek_v3", num_hidden_layers=1, rope_scaling=dense_stack.YARN)
CONFIG = mla.MLAConfig.from_hf(HF)
NAMES, WIDTH, NUM_PAGES, AXIS = ("a", "b", "c"), 12, 40, "context"
CPUS = jax.local_devices(backend="cpu")
SPECS = context.weight_specs(AXIS), P(), P(AXIS), P(AXIS), P(), P(AXIS), P()
# New tokens of the requests in each step: ragged prefill, a chunk behind it, decode, MTP.
PREFILLS = (70, 0, 5), (600, 130, 1)
DECODES = 1, 1, 2
TOLERANCE = 1e-4  # relative to the results' root mean square


@pytest.fixture(scope="module")
def weights() -> mla.MLAWeights:
    tensors = dense_stack.random_tensors(HF)
    return mla.load_weights(tensors, CONFIG, prefix="model.layers.0.self_attn.")


def states(step: int, s_q: int) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (len(NAMES), s_q, HF["hidden_size"]))


class OneDevice:
    """Requests on one device."""

    def __init__(self, weights: mla.MLAWeights) -> None:
        self.weights, self.pages = weights, PagePool(NUM_PAGES, max_pages_per_seq=WIDTH)
        self.pool = cache.make_pool(1, NUM_PAGES, dtype=jnp.float32)
        for name in NAMES:
            self.pages.add(name)

    def run(self, x: jax.Array, counts: tuple[int, ...], *, prefill: bool) -> jax.Array:
        slots = self.pages.append(dict(zip(NAMES, counts, strict=True))).slots
        rows = self.pages.rows(list(NAMES))
        new = (np.array(counts, np.int32),) if prefill else ()
        make, layer = (mla.prefill_step, mla.prefill) if prefill else (mla.decode_step, mla.decode)
        step = make(CONFIG, rows.block_table, rows.cache_seqlens, *new, slots)
        y, self.pool = layer(self.weights, CONFIG, x, self.pool, step)
        return y


class Divided:
    """The same requests over the devices of an axis, with an allocator for each."""

    def __init__(self, weights: mla.MLAWeights, n: int, axis_type: AxisType, exchange: str) -> None:
        self.n = n
        self.mesh = jax.make_mesh((n,), (AXIS,), axis_types=(axis_type,), devices=CPUS[:n])
        self.pages = [PagePool(NUM_PAGES // n + 3, max_pages_per_seq=WIDTH) for _ in range(n)]
        self.lengths = np.zeros(len(NAMES), np.int32)
        pool = cache.make_pool(n, NUM_PAGES // n + 3, dtype=jnp.float32)
        self.pool = self.placed(pool, P(AXIS))
        self.weights = context.shard_weights(weights, self.mesh, AXIS)
        self.programs = {
            prefill: jax.jit(
                jax.shard_map(
                    functools.partial(local_prefill if prefill else local_decode, exchange),
                    mesh=self.mesh,
                    in_specs=SPECS,
                    out_specs=(P(), P(AXIS)),
                )
            )
            for prefill in (True, False)
        }
        for pages in self.pages:
            for name in NAMES:
                pages.add(name)

    def placed(self, array: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.mesh, spec))

    def run(self, x: jax.Array, counts: tuple[int, ...], *, prefill: bool) -> jax.Array:
        new = np.array(counts, np.int32)
        after = self.lengths + new
        held = np.subtract(
            *(np.asarray(context_parallel.split_seqlens(z, self.n)) for z in (after, self.lengths))
        )
        for pages, own in zip(self.pages, held, strict=True):
            pages.append(dict(zip(NAMES, own.tolist(), strict=True)))
        tables = np.stack([pages.rows(list(NAMES)).block_table for pages in self.pages])
        places = self.lengths[:, None] + np.arange(x.shape[1], dtype=np.int32)
        places = np.where(places < after[:, None], places, -1).astype(np.int32)
        slots = np.asarray(context_parallel.split_slots(tables, places))
        self.lengths = after
        with jax.set_mesh(self.mesh):
            arrays = [self.placed(z, s) for z, s in ((tables, P(AXIS)), (after, P()))]
            rest = [self.placed(slots, P(AXIS)), self.placed(new, P())]
            y, self.pool = self.programs[prefill](
                self.weights, self.placed(x, P()), self.pool, *arrays, *rest
            )
        return y


def local_prefill(_: str, weights: mla.MLAWeights, *arrays: jax.Array) -> tuple:
    x, pool, table, lengths, slots, new = arrays
    step = context.prefill_step(CONFIG, table[0], lengths, new, slots[0])
    step = step.at_layer(0, pool.shape[0])
    return context.prefill(weights, CONFIG, x, pool, step, axis_name=AXIS)


def local_decode(exchange: str, weights: mla.MLAWeights, *arrays: jax.Array) -> tuple:
    x, pool, table, lengths, slots, _ = arrays
    over = {"axis_name": AXIS, "exchange": exchange}
    step = context.decode_step(CONFIG, table[0], lengths, slots[0], **over)
    return context.decode(weights, CONFIG, x, pool, step.at_layer(0, pool.shape[0]), **over)


@pytest.mark.parametrize(
    ("n", "axis_type", "exchange", "biased"),
    [
        (2, AxisType.Auto, "gather", True),
        (4, AxisType.Explicit, "direct", False),
        (4, AxisType.Auto, "heads", False),
        (1, AxisType.Explicit, "direct", False),
    ],
)
def test_prefill_in_chunks_and_decode_are_one_devices(
    weights: mla.MLAWeights, n: int, axis_type: AxisType, exchange: str, biased: bool
) -> None:
    if biased:
        bias = jax.random.normal(jax.random.key(7), (HF["hidden_size"],))
        weights = weights._replace(output_bias=bias)
    one, divided = OneDevice(weights), Divided(weights, n, axis_type, exchange)
    steps = [(counts, True) for counts in PREFILLS] + [((s_q,) * 3, False) for s_q in DECODES]
    for i, (counts, prefill) in enumerate(steps):
        x = states(i, max(counts))
        expected, got = (z.run(x, counts, prefill=prefill) for z in (one, divided))
        size = float(jnp.sqrt(jnp.mean(jnp.square(expected))))
        assert float(jnp.abs(got - expected).max()) <= TOLERANCE * size, (i, counts)


def test_each_token_is_cached_once(weights: mla.MLAWeights) -> None:
    divided = Divided(weights, 4, AxisType.Auto, "gather")
    divided.run(states(0, 70), (70, 0, 5), prefill=True)
    written = (np.asarray(divided.pool) != 0).any(axis=(2, 3)).reshape(4, -1)
    assert written.sum(axis=1).tolist() == [69, 6, 0, 0]  # pages of 64: 64 + 5, 6


def test_nothing_of_the_caches_size_travels_in_decode(weights: mla.MLAWeights) -> None:
    divided = Divided(weights, 2, AxisType.Auto, "gather")
    shapes = [(3, 1, 256), divided.pool.shape, (2, 3, WIDTH), (3,), (2, 3, 1), (3,)]
    dtypes = [jnp.float32] * 2 + [jnp.int32] * 4
    arrays = [jax.ShapeDtypeStruct(*z) for z in zip(shapes, dtypes, strict=True)]
    text = divided.programs[False].lower(divided.weights, *arrays).compile().as_text()
    found = re.findall(r"f32\[([\d,]+)\]\S* (all-gather|all-reduce)", text)
    assert {name for _, name in found} == {"all-gather", "all-reduce"}
    largest = max(math.prod(map(int, dims.split(","))) for dims, _ in found)
    assert largest <= 2 * 3 * 4 * 512  # two partials of 3 requests, 4 heads


def test_weights_that_cannot_be_shared_are_refused(weights: mla.MLAWeights) -> None:
    mesh = jax.make_mesh((3,), (AXIS,), devices=CPUS[:3])
    with pytest.raises(ValueError, match="weights: got 4 heads, expected a multiple of the 3 dev"):
        context.shard_weights(weights, mesh, AXIS)
    with pytest.raises(ValueError, match=r"axis_name: got 'pages', expected one of \['context'\]"):
        context.shard_weights(weights, mesh, "pages")


def test_a_step_of_prefill_is_no_step_of_decode(weights: mla.MLAWeights) -> None:
    step = context.ContextStep(None)
    with pytest.raises(ValueError, match="step: got one without schedules, expected that of dec"):
        context.decode(weights, CONFIG, states(0, 1), jnp.zeros(1), step, axis_name=AXIS)
