"""Decode over caches that are spread over a mesh axis: context parallelism.

The pages of each sequence are dealt out to the devices of an axis, page p to device `p % n`
(`_page_shares` says why), and each device has a pool and a block table of its own pages. All get
the same queries and the same lengths, attend to what they hold, and merge.

A causal mask cuts the last s_q - 1 keys off in steps. They may lie on several devices, while the
kernel's mask is aligned to the end of what it reads. So the keys are divided in two:

1. whole pages that every query sees, page p with `64 (p + 1) <= length - (s_q - 1)`: one decode of
   all queries together, without a mask;
2. the pages behind them, one or two for up to 66 queries: each query is a request of its own, with
   its own length.

A length without a mask, or with one query, needs only one decode.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_flashmla import _exchange, _shapes
from jax_flashmla._api import mla_decode
from jax_flashmla._dispatch import Implementation
from jax_flashmla._exchange import Exchange
from jax_flashmla._page_shares import share, split_block_table, split_seqlens, split_slots
from jax_flashmla._shapes import PAGE_SIZE

__all__ = [
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
            traffic, in two rounds. n must divide h_q.
        num_sm_parts: as in `mla_decode`.
        implementation: as in `mla_decode`, for decode and merge.

    Returns:
        out `[b, s_q, h_q, 512]` of q_latent's dtype and lse float32 `[b, s_q, h_q]`, the same bits
        on all devices of the axis, so that `out_specs` may leave the axis out.

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
    _exchange.check(exchange, shape.h_q, n)
    options = {
        "softmax_scale": _shapes.check_softmax_scale(softmax_scale),
        "num_sm_parts": num_sm_parts,
        "implementation": implementation,
    }
    if shape.is_trivial:
        return mla_decode(*arrays, **options)
    in_steps = _shapes.check_flag("causal", causal) and shape.s_q > 1
    outs, lses = _partials(*arrays, jax.lax.axis_index(axis_name), n, in_steps, options)
    return _exchange.merge_over(
        outs, lses, axis_name=axis_name, exchange=exchange, implementation=implementation
    )


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


def _partials(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    device: jax.Array,
    n: int,
    in_steps: bool,
    options: dict,
) -> tuple[jax.Array, jax.Array]:
    """Attends to this device's keys: outs `[k, b, s_q, h_q, 512]` and lses, one or two of them."""
    (b, s_q, *_), width = q_latent.shape, block_table.shape[1]
    lengths = jnp.clip(cache_seqlens, 0, min(n * width * PAGE_SIZE, np.iinfo(np.int32).max))
    seen = jnp.maximum(lengths - (s_q - 1), 0) // PAGE_SIZE * PAGE_SIZE if in_steps else lengths
    held = share(seen, device, n)  # [b], of the keys that all queries see
    decode = {"causal": False} | options
    first = mla_decode(q_latent, q_rope, kv_cache, block_table, held, **decode)
    if not in_steps:
        return first[0][None], first[1][None]

    # The rest: at most s_q + 62 keys, from a page of this device's table on.
    pages = -(-(s_q + PAGE_SIZE - 2) // PAGE_SIZE)
    columns = (held // PAGE_SIZE)[:, None] + jnp.arange(-(-pages // n), dtype=jnp.int32)[None]
    table = jnp.take_along_axis(block_table, columns, axis=1, mode="fill", fill_value=-1)
    after = jnp.arange(s_q - 1, -1, -1, dtype=jnp.int32)
    visible = jnp.maximum(lengths[:, None] - after[None], 0)  # [b, s_q]
    rest = share(visible, device, n) - held[:, None]
    queries = (x.reshape(b * s_q, 1, *x.shape[2:]) for x in (q_latent, q_rope))
    out, lse = mla_decode(
        *queries, kv_cache, jnp.repeat(table, s_q, axis=0), rest.reshape(-1), **decode
    )
    out, lse = out.reshape(first[0].shape), lse.reshape(first[1].shape)
    return jnp.stack([first[0], out]), jnp.stack([first[1], lse])


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
