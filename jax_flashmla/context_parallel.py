"""Decode over caches that are spread over a mesh axis: context parallelism.

The pages of each sequence are dealt out to the devices of an axis, page p to device `p % n`
(`_page_shares` says why), and each device has a pool and a block table of its own pages. All get
the same queries and the same lengths, attend to what they hold, and merge. `_context_decode` says
how a causal mask is kept.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_flashmla import _context_decode, _direct_exchange, _exchange, _shapes
from jax_flashmla._api import mla_decode
from jax_flashmla._direct_exchange import Mailboxes
from jax_flashmla._dispatch import Implementation
from jax_flashmla._exchange import Exchange
from jax_flashmla._page_shares import split_block_table, split_seqlens, split_slots
from jax_flashmla.schedule import Schedule

__all__ = [
    "Mailboxes",
    "get_mailboxes",
    "get_schedules",
    "mla_decode_context_parallel",
    "mla_decode_over_mesh",
    "split_block_table",
    "split_seqlens",
    "split_slots",
]


def mla_decode_context_parallel(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: str,
    softmax_scale: float,
    causal: bool = True,
    exchange: Exchange = "gather",
    own_heads: bool = False,
    schedules: Sequence[Schedule] | None = None,
    mailboxes: Mailboxes | None = None,
    num_sm_parts: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Decodes one step over the caches of a mesh axis, inside `jax.shard_map`.

    `mla_decode` of the whole sequences, on every device of the axis. Partial results travel in the
    dtype of the queries, which is what the kernel writes, with their lse in float32; they are
    merged in float32 and rounded once more. Devices without a key of a request are empty partials.

    Args:
        q_latent: `[b, s_q, h_q, 512]`, the same on all devices of the axis.
        q_rope: `[b, s_q, h_q, 64]`, likewise.
        kv_cache: this device's pool `[num_pages, 64, h_kv, 576]`.
        block_table: int32 `[b, max_pages_per_seq]`, this device's pages of each request: column c
            is the request's page `c * n + jax.lax.axis_index(axis_name)`.
        cache_seqlens: int32 `[b]`, tokens of each request on all devices together, the same on all
            of them. Lengths beyond the tables count as `n * max_pages_per_seq * 64`.
        axis_name: the mesh axis, of n devices.
        softmax_scale: as in `mla_decode`.
        causal: as in `mla_decode`, of the whole sequence.
        exchange: how partials are merged. "gather": every device gets all of them, n times a
            result, in one round. "heads": an all-to-all gives each device all partials of its h_q /
            n heads, and the merged heads are gathered: 1/n of the merging and about 2 / n of the
            traffic, in two rounds. n must divide h_q. On 2 and 4 H200s "gather" is nearly always
            the faster one of these two. "direct": devices write into each other's memory, over
            NVLink, in the kernel that merges. The fastest, for up to 16 GPUs of one process and
            65,536 partial rows (b * s_q * h_q, twice that of a causal step with several queries);
            beyond that, where there is no kernel, and in exports with an open batch or for several
            platforms at once, it is "gather". All GPUs of the axis have to make the same calls,
            as for a collective: one that does not come to it within a minute (or the seconds in the
            environment's JAX_FLASHMLA_EXCHANGE_PATIENCE), or that another one cannot reach, makes
            the results NaN. Two of a program may not run side by side, as XLA's command buffers do
            in scheduling mode CONCURRENT, unless one's result goes into the other.
        own_heads: whether this device gets its h_q / n heads alone, those from
            `jax.lax.axis_index(axis_name) * h_q // n` on, as output projections divided by heads
            want them. "heads" then takes one round. n must divide h_q.
        schedules: result of `get_schedules` for these tables and lengths, to share it between
            layers. None schedules here.
        mailboxes: result of `get_mailboxes`, for exchange="direct", to share it between layers.
            None opens them here.
        num_sm_parts: as in `mla_decode`.
        implementation: as in `mla_decode`, for decode and merge.

    Returns:
        out `[b, s_q, h_q, 512]` of q_latent's dtype and lse float32 `[b, s_q, h_q]`, the same bits
        on all devices of the axis, so that `out_specs` may leave the axis out. With own_heads
        `[b, s_q, h_q / n, 512]` and `[b, s_q, h_q / n]`.

    Raises:
        ValueError: a shape or value is wrong; the axis is unknown; n does not divide h_q.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    names = "q_latent", "q_rope", "kv_cache", "block_table", "cache_seqlens"
    values = q_latent, q_rope, kv_cache, block_table, cache_seqlens
    arrays = _shapes.as_arrays(**dict(zip(names, values, strict=True)))
    shape = _shapes.split_decode_shape(*arrays)
    n = _manual_axis_size(axis_name)
    own_heads = _shapes.check_flag("own_heads", own_heads)
    _exchange.check(exchange, shape.h_q, n, own_heads=own_heads)
    options = {
        "softmax_scale": _shapes.check_positive("softmax_scale", softmax_scale),
        "num_sm_parts": num_sm_parts,
        "implementation": implementation,
    }
    if shape.is_trivial:
        result = mla_decode(*arrays, **options)
        return _exchange.own_share(result, axis_name, 2) if own_heads else result
    found = _context_decode.pieces(
        *arrays[3:], shape.s_q, axis_name=axis_name, causal=_shapes.check_flag("causal", causal)
    )
    given = _checked_schedules(schedules, len(found))
    outs, lses = _context_decode.partials(*arrays[:3], found, given, options)
    return _exchange.merge_over(
        outs,
        lses,
        axis_name=axis_name,
        exchange=exchange,
        own_heads=own_heads,
        implementation=implementation,
        mailboxes=mailboxes,
    )


def get_schedules(
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: str,
    s_q: int,
    h_q: int,
    h_kv: int = 1,
    causal: bool = True,
    num_sm_parts: int | None = None,
) -> tuple[Schedule, ...]:
    """Makes the schedules of `mla_decode_context_parallel`, once per step, for all layers.

    XLA shares the schedules of layers that stand one after the other in a program by itself. It
    does not move them out of a loop over layers: there, call this before the loop.

    Args:
        block_table: int32 `[b, max_pages_per_seq]`, this device's.
        cache_seqlens: int32 `[b]`, tokens of each request on all devices together.
        axis_name: the mesh axis.
        s_q: query tokens per request.
        h_q: query heads of this device.
        h_kv: KV heads.
        causal: as in the decode.
        num_sm_parts: as in `get_mla_metadata`.

    Returns:
        One schedule, or two of a causal step with several queries.

    Raises:
        ValueError: a shape or count is wrong; the axis is unknown.
        TypeError: a dtype is wrong, or a static argument is traced.
    """
    table, lengths = _shapes.as_arrays(block_table=block_table, cache_seqlens=cache_seqlens)
    _shapes.check_shape("block_table", table, (_shapes.check_seqlens(lengths), "max_pages_per_seq"))
    _shapes.check_dtype("block_table", table, jnp.int32)
    _manual_axis_size(axis_name)
    counts = [_shapes.check_count(*x) for x in (("s_q", s_q), ("h_q", h_q), ("h_kv", h_kv))]
    masked = _shapes.check_flag("causal", causal)
    found = _context_decode.pieces(table, lengths, s_q, axis_name=axis_name, causal=masked)
    return _context_decode.schedules(found, *counts, num_sm_parts)


def get_mailboxes(
    *, axis_name: str, b: int, s_q: int, h_q: int, implementation: Implementation = None
) -> Mailboxes:
    """Opens what `mla_decode_context_parallel` with exchange="direct" needs, inside a shard_map.

    Layers that stand one after the other in a program share it by themselves, through XLA. For a
    loop over layers call this before the loop; its result is the same for all batches up to b.

    Args:
        axis_name: the mesh axis.
        b: requests.
        s_q: query tokens per request.
        h_q: query heads of this device.
        implementation: as in the decode.

    Returns:
        Mailboxes, the same on all devices of the axis. They live as long as the process, in memory
        outside of JAX's: 2.8 KB for each partial row and GPU of the host, rows rounded up to a
        power of two.

    Raises:
        ValueError: a count is wrong; the axis is unknown.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
    """
    _manual_axis_size(axis_name)
    counts = [_shapes.check_count(*x) for x in (("b", b), ("s_q", s_q), ("h_q", h_q))]
    rows = math.prod(counts) * (1 if s_q == 1 else _context_decode.MOST_PIECES)
    return _direct_exchange.get_mailboxes(rows, axis_name=axis_name, implementation=implementation)


def mla_decode_over_mesh(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_tables: jax.Array,
    cache_seqlens: jax.Array,
    *,
    axis_name: str,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    softmax_scale: float,
    causal: bool = True,
    exchange: Exchange = "gather",
    num_sm_parts: int | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Decodes one step over the caches of a mesh axis, from outside of `jax.shard_map`.

    `mla_decode_context_parallel` in a shard_map over the whole mesh, Auto or Explicit. Requests may
    be sharded over a second axis and query heads over a third; over any other axis everything is
    repeated.

    Args:
        q_latent: `[b, s_q, h_q, 512]`.
        q_rope: `[b, s_q, h_q, 64]`.
        kv_cache: `[devices * num_pages, 64, h_kv, 576]`, the pools of all devices one after the
            other, sharded over `axis_name`, or over `(batch_axis, axis_name)`.
        block_tables: int32 `[n, b, max_pages_per_seq]`, the table of each device of the axis, with
            page numbers of that device's own pool; sharded over `axis_name` and `batch_axis`.
        cache_seqlens: int32 `[b]`, tokens of each request on all devices together.
        axis_name: the mesh axis of n devices that the pages are spread over.
        mesh: None for the one of `jax.set_mesh`.
        batch_axis: mesh axis that the requests are sharded over, None for no axis.
        head_axis: mesh axis that the query heads are sharded over, None for no axis. The pools are
            repeated over it, so h_kv must be 1.
        softmax_scale: as in `mla_decode`.
        causal: as in `mla_decode`.
        exchange: as in `mla_decode_context_parallel`.
        num_sm_parts: as in `mla_decode`.
        implementation: as in `mla_decode`.

    Returns:
        out `[b, s_q, h_q, 512]` of q_latent's dtype and lse float32 `[b, s_q, h_q]`, sharded over
        `batch_axis` and `head_axis`.

    Raises:
        ValueError: a shape or value is wrong; there is no mesh or no such axis; a dimension cannot
            be divided evenly; an array is sharded over an Explicit axis in another way.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    named = {"axis_name": axis_name, "batch_axis": batch_axis, "head_axis": head_axis}
    _check_axes(mesh, {key: name for key, name in named.items() if name is not None})
    arrays = _shapes.as_arrays(
        q_latent=q_latent,
        q_rope=q_rope,
        kv_cache=kv_cache,
        block_tables=block_tables,
        cache_seqlens=cache_seqlens,
    )
    pool = axis_name if batch_axis is None else (batch_axis, axis_name)
    specs = {
        "q_latent": PartitionSpec(batch_axis, None, head_axis, None),
        "q_rope": PartitionSpec(batch_axis, None, head_axis, None),
        "kv_cache": PartitionSpec(pool, None, None, None),
        "block_tables": PartitionSpec(axis_name, batch_axis, None),
        "cache_seqlens": PartitionSpec(batch_axis),
    }
    if len(arrays[3].shape) != 3 or arrays[3].shape[0] != mesh.shape[axis_name]:
        raise ValueError(
            f"block_tables: got shape {list(arrays[3].shape)}, expected"
            f" [{mesh.shape[axis_name]}, b, max_pages_per_seq], a table per device of {axis_name!r}"
        )
    if head_axis is not None and arrays[2].shape[2:3] != (1,):
        raise ValueError(
            f"kv_cache: got shape {list(arrays[2].shape)} with head_axis, expected one KV head"
        )
    placed = [
        _placed(name, x, mesh, spec) for (name, spec), x in zip(specs.items(), arrays, strict=True)
    ]

    def local(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return mla_decode_context_parallel(
            *arrays[:3],
            arrays[3][0],
            arrays[4],
            axis_name=axis_name,
            softmax_scale=softmax_scale,
            causal=causal,
            exchange=exchange,
            num_sm_parts=num_sm_parts,
            implementation=implementation,
        )

    out_specs = specs["q_latent"], PartitionSpec(batch_axis, None, head_axis)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs.values()), out_specs=out_specs)
    return mapped(*placed)


def _checked_schedules(given: Sequence[Schedule] | None, count: int) -> Sequence[Schedule | None]:
    if given is None:
        return [None] * count
    if len(given) != count:
        raise ValueError(
            f"schedules: got {len(given)}, expected the {count} that get_schedules returns for"
            " these queries"
        )
    return given


def _manual_axis_size(axis_name: str) -> int:
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    if axis_name not in manual:
        raise ValueError(
            f"axis_name: got {axis_name!r}, expected one of {list(manual)}, the mesh axes that an"
            " enclosing jax.shard_map maps over"
        )
    return jax.lax.axis_size(axis_name)


def _check_axes(mesh: Mesh | AbstractMesh, named: dict[str, str]) -> None:
    if mesh.empty:
        raise ValueError("mesh: got None without jax.set_mesh, expected a mesh")
    for argument, name in named.items():
        if name not in mesh.axis_names:
            raise ValueError(
                f"{argument}: got {name!r}, expected one of {list(mesh.axis_names)}, the axes of"
                " the mesh"
            )
    if len(set(named.values())) < len(named):
        raise ValueError(f"{', '.join(named)}: got {named}, expected different axes")


def _placed(
    name: str, array: jax.Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> jax.Array:
    """Checks that an array divides evenly, and shards it further where that moves nothing."""
    if len(array.shape) != len(spec):
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {len(spec)} dimensions")
    for dimension, (size, axes) in enumerate(zip(array.shape, spec, strict=True)):
        shards = _size(mesh, axes)
        if size % shards:
            raise ValueError(
                f"{name}: got {size} in dimension {dimension}, expected a multiple of the {shards}"
                f" devices of {axes!r}"
            )
    if AxisType.Explicit not in mesh.axis_types:
        return array
    given = jax.typeof(array).sharding.spec
    padded = (*given, *[None] * (len(spec) - len(given)))
    if any(have not in (None, want) for have, want in zip(padded, spec, strict=True)):
        raise ValueError(
            f"{name}: got sharding {given} over Explicit mesh axes, expected {spec}: jax.reshard"
            " would move it"
        )
    return jax.reshard(array, NamedSharding(mesh, spec))


def _size(mesh: Mesh | AbstractMesh, axes: str | Sequence[str] | None) -> int:
    names = [axes] if isinstance(axes, str) else axes or []
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size
