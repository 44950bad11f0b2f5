"""The rows of `mesh.py`, and for each the programs that are timed on one and several GPUs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import contenders
import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding
from workload import PAGE_SIZE, SOFTMAX_SCALE, Row, deal_tables, random_latent, random_rope

from jax_flashmla import _exchange, context_parallel, mla_decode

DECODE = functools.partial(mla_decode, softmax_scale=SOFTMAX_SCALE)
AXIS = "gpus"
SHARED_CALLS = 32  # of a chain that runs over several GPUs: hides how differently they start
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A row and the way in which it is spread over GPUs.

    Attributes:
        way: "requests" (``row`` is what each GPU gets), "heads" or "context" (it is the whole).
        row: Shape.
    """

    way: str
    row: Row

    @property
    def name(self) -> str:
        """Such as context/8x131072/h128/s1."""
        return f"{self.way}/{self.row.name}"

    def shrunk(self) -> "Spread":
        """The same, small enough for a CPU."""
        small = dataclasses.replace(self.row.shrunk(), h_q=min(self.row.h_q, 16))
        return dataclasses.replace(self, row=small)


SPREADS = (
    *(Spread("requests", Row(h_q, 1, 128, 8192)) for h_q in (16, 64, 128)),
    Spread("heads", Row(128, 1, 128, 8192)),
    *(Spread("context", Row(128, 1, *shape)) for shape in ((8, 131072), (1, 524288))),
    *(Spread("context", Row(16, 1, *shape)) for shape in ((8, 131072), (1, 131072))),
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A chain of calls to be timed.

    Attributes:
        name: Within its row, such as "gather on 2".
        attend: One call: maps a state, the arrays of ``rest`` and a table to the next state.
        state: What the first call gets; donated.
        rest: What every call gets.
        tables: KV sets to rotate over.
        calls: In one chain.
        scan: Whether the chain is a loop, else its calls stand one after the other.
        before: What stands before the calls: maps ``rest`` and the first table to what every call
            gets behind its table.
        captured: Whether collectives may be part of command buffers, which are CUDA graphs. XLA
            leaves them out unless it is told.
    """

    name: str
    attend: Callable[..., object]
    state: object
    rest: Arrays
    tables: tuple[jax.Array, ...]
    calls: int
    scan: bool = False
    captured: bool = False
    before: Callable[..., tuple] = lambda *_: ()

    def variants(self) -> Iterator["Program"]:
        """The program, also captured."""
        name, on = self.name.rsplit(" on ", 1)
        yield self
        yield dataclasses.replace(self, name=f"{name}, captured on {on}", captured=True)


class Pools:
    """One pool on each device, the same bits on all; arrays over meshes are made of them."""

    def __init__(self, devices: Sequence[jax.Device], pages: int) -> None:
        shape = (pages, PAGE_SIZE, 1, 576)

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, shape, jnp.bfloat16)

        keys = [jax.device_put(jax.random.key(0), device) for device in devices]
        drawn = jax.jit(draw)
        self.parts = {device: drawn(key) for device, key in zip(devices, keys, strict=True)}
        self.pages = pages

    def over(self, mesh: Mesh, spec: P) -> jax.Array:
        """The pools of a mesh's devices end to end, or one of them repeated; nothing is copied."""
        count = mesh.size if spec else 1
        parts = [self.parts[device] for device in mesh.devices.flat]
        shape = (count * self.pages, *parts[0].shape[1:])
        sharding = NamedSharding(mesh, P(*spec, *[None] * (4 - len(spec))))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def programs(spread: Spread, pools: Pools, counts: Sequence[int]) -> Iterator[Program]:
    """All programs of a row: each GPU alone, then on so many GPUs together as ``counts`` say."""
    devices, row = list(pools.parts), spread.row
    for i, device in enumerate(devices[: max(counts)]):
        yield alone(f"alone, GPU {i}", row, pools, device)
    for n in counts:
        if n == 1:
            continue
        mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Explicit,), devices=devices[:n])
        if spread.way == "requests":
            whole = dataclasses.replace(row, batch=n * row.batch)
            yield over_requests(f"on {n}", whole, np.tile(row.lengths, n), pools, mesh)
        elif spread.way == "heads":
            one = dataclasses.replace(row, h_q=row.h_q // n)
            yield alone(f"{one.h_q} heads alone, GPU 0", one, pools, devices[0])
            yield over_heads(f"on {n}", row, pools, mesh)
        else:
            yield from over_context(row, pools, mesh)


def alone(name: str, row: Row, pools: Pools, device: jax.Device) -> Program:
    """The plain op on one device."""
    rng, put = np.random.default_rng(1), functools.partial(jax.device_put, device=device)
    tables = tuple(put(x) for x in deal_tables(rng, pools.pages, row.pages, row.sets))
    rest = put(random_rope(rng, row)), pools.parts[device], put(row.lengths)
    return Program(
        name, _decode, put(random_latent(rng, row)), rest, tables, contenders.OURS.calls(row)
    )


def over_requests(
    name: str, row: Row, lengths: np.ndarray, pools: Pools, mesh: Mesh, calls: int | None = None
) -> Program:
    """Requests sharded, each device with its own pages."""
    rng, put = np.random.default_rng(1), functools.partial(_put, mesh)
    n, local = mesh.size, dataclasses.replace(row, batch=row.batch // mesh.size)
    pages = -(-lengths.reshape(n, -1).max(axis=0) // PAGE_SIZE)  # of the fullest device
    sets = [np.tile(table, (n, 1)) for table in deal_tables(rng, pools.pages, pages, local.sets)]
    rest = put(random_rope(rng, row), AXIS), pools.over(mesh, P(AXIS)), put(lengths, AXIS)
    tables = tuple(put(x, AXIS) for x in sets)
    calls = calls or contenders.OURS.calls(local)
    return Program(name, _decode, put(random_latent(rng, row), AXIS), rest, tables, calls)


def over_heads(name: str, row: Row, pools: Pools, mesh: Mesh) -> Program:
    """Query heads sharded, the pool whole on every device."""
    rng, put = np.random.default_rng(1), functools.partial(_put, mesh)
    tables = tuple(put(x) for x in deal_tables(rng, pools.pages, row.pages, row.sets))
    rest = put(random_rope(rng, row), None, None, AXIS), pools.over(mesh, P()), put(row.lengths)
    state = put(random_latent(rng, row), None, None, AXIS)
    return Program(name, _decode, state, rest, tables, contenders.OURS.calls(row))


def over_context(row: Row, pools: Pools, mesh: Mesh) -> Iterator[Program]:
    """The pages of each request spread: whole calls, the attention alone, exchange and merge alone.

    Attention alone is a decode of each device's share; the schedules are then each device's own, as
    in whole calls. Alone, partial results of one call are the merged ones of the call before.
    """
    rng, put, n = np.random.default_rng(1), functools.partial(_put, mesh), mesh.size
    shares = context_parallel.split_seqlens(row.lengths, n)  # [n, b]
    pages = -(-shares.max(axis=0) // PAGE_SIZE)
    local = deal_tables(rng, pools.pages, pages, row.sets)
    tables = tuple(put(np.tile(table, (n, 1, 1)), AXIS) for table in local)
    calls = max(SHARED_CALLS, contenders.OURS.calls(row))
    rest = put(random_rope(rng, row)), pools.over(mesh, P(AXIS)), put(row.lengths)
    latent = random_latent(rng, row)
    for exchange in _exchange.EXCHANGES:
        attend = functools.partial(_over_context, mesh=mesh, exchange=exchange)
        whole = Program(f"{exchange} on {n}", attend, put(latent), rest, tables, calls)
        yield from whole.variants()
        prepared = functools.partial(_over_context_prepared, mesh=mesh, exchange=exchange)
        yield dataclasses.replace(
            whole,
            name=f"{exchange}, in a scan on {n}",
            attend=prepared,
            scan=True,
            before=functools.partial(_prepare, mesh=mesh, row=row),
        )
    many = dataclasses.replace(row, batch=n * row.batch)
    yield over_requests(f"attention on {n}", many, shares.reshape(-1), pools, mesh, calls)
    partials = put(np.tile(latent, (n, 1, 1, 1)), AXIS), put(np.zeros(many_rows(many)), AXIS)
    for exchange in _exchange.EXCHANGES:
        merge = functools.partial(_merge, mesh=mesh, exchange=exchange)
        alone = Program(
            f"merge, {exchange} on {n}", merge, partials, (), (put(np.zeros(1)),), calls
        )
        yield from alone.variants()


def many_rows(row: Row) -> tuple[int, int, int]:
    """Dimensions of an lse."""
    return row.batch, row.s_q, row.h_q


def _decode(
    q_latent: jax.Array, q_rope: jax.Array, pool: jax.Array, lengths: jax.Array, table: jax.Array
) -> jax.Array:
    return DECODE(q_latent, q_rope, pool, table, lengths)[0]


def _over_context(
    q_latent: jax.Array,
    q_rope: jax.Array,
    pool: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    *,
    mesh: Mesh,
    exchange: _exchange.Exchange,
) -> jax.Array:
    out, _ = context_parallel.mla_decode_over_mesh(
        *(q_latent, q_rope, pool, tables, lengths),
        axis_name=AXIS,
        mesh=mesh,
        softmax_scale=SOFTMAX_SCALE,
        exchange=exchange,
    )
    return out


def _prepare(
    _q_rope: jax.Array,
    _pool: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    *,
    mesh: Mesh,
    row: Row,
) -> tuple:
    """What layers of a loop share: schedules and mailboxes."""

    def local(tables: jax.Array, lengths: jax.Array) -> tuple:
        counts = {"s_q": row.s_q, "h_q": row.h_q}
        made = context_parallel.get_schedules(tables[0], lengths, axis_name=AXIS, **counts)
        return made, context_parallel.get_mailboxes(axis_name=AXIS, b=row.batch, **counts)

    specs = P(AXIS, None, None), P(None)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(AXIS), P()))
    return mapped(tables, lengths)


def _over_context_prepared(*arrays: object, mesh: Mesh, exchange: _exchange.Exchange) -> jax.Array:
    def local(*arrays: object) -> jax.Array:
        *whole, lengths, tables, schedules, mailboxes = arrays
        out, _ = context_parallel.mla_decode_context_parallel(
            *(*whole, tables[0], lengths),
            axis_name=AXIS,
            softmax_scale=SOFTMAX_SCALE,
            exchange=exchange,
            schedules=schedules,
            mailboxes=mailboxes,
        )
        return out

    on_each = P(AXIS)
    specs = P(), P(), on_each, P(), on_each, on_each, P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*arrays)


def _merge(
    partials: Arrays, _: jax.Array, *, mesh: Mesh, exchange: _exchange.Exchange
) -> tuple[jax.Array, ...]:
    def local(out: jax.Array, lse: jax.Array) -> Arrays:
        return _exchange.merge_over(
            out[None], lse[None], axis_name=AXIS, exchange=exchange, implementation=None
        )

    specs = P(AXIS, None, None, None), P(AXIS, None, None)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return mapped(*partials)


def _put(mesh: Mesh, array: np.ndarray, *spec: str | None) -> jax.Array:
    """Puts an array on a mesh; the spec gets as long as the array, as those of results are."""
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    full = P(*spec, *[None] * (array.ndim - len(spec)))
    return jax.device_put(array, NamedSharding(mesh, full))
