"""The exchange without a collective: devices of one process write into each other's memory.

Every device stores its partial results into mailboxes of the others, over NVLink, and merges what
comes into its own: one kernel in the place of an all-gather and a merge (`cuda/exchange`). Where
the mailboxes are travels as data, in an all-gather of 32 bytes, once per program or step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.sharding import AxisType

from jax_flashmla import _cache_shapes, _dispatch, _ffi, _manual_axes, _merge, _mesh, _operation
from jax_flashmla._dispatch import Implementation
from jax_flashmla._shapes import HEAD_DIM_V

ADDRESS_WORDS = 8
MAX_DEVICES = 16
MAX_ROWS = 1 << 16  # partial rows of one device

addresses_p = Primitive("flashmla_addresses")
exchange_p = Primitive("flashmla_exchange")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["addresses"], meta_fields=["rows"]
)
@dataclasses.dataclass(frozen=True)
class Mailboxes:
    """Where the devices of a mesh axis leave partial results for each other.

    Attributes:
        addresses: uint32 `[n, 8]`, the same on all n devices. Good for this process alone, and as
            long as it lives.
        rows: partial rows that each device may leave, static.
    """

    addresses: jax.Array
    rows: int


def get_mailboxes(rows: int, *, axis_name: str, implementation: Implementation) -> Mailboxes:
    """Opens mailboxes for so many partial rows of each device, inside `jax.shard_map`."""
    index, most = jax.lax.axis_index(axis_name), min(rows, MAX_ROWS)  # more rows are gathered
    static = {"axis_name": axis_name, "rows": most, "implementation": implementation}
    return Mailboxes(*addresses_p.bind(index, **static), rows)


def merge_over(
    outs: jax.Array,
    lses: jax.Array,
    mailboxes: Mailboxes | None,
    *,
    axis_name: str,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """Merges the partial results of all devices of an axis, inside `jax.shard_map`.

    Args:
        outs: `[k, ..., 512]`, the k partials of this device.
        lses: float32 `[k, ...]`.
        mailboxes: None to open them here.
        axis_name: the mesh axis.
        implementation: "xla" for collectives and the portable merge, None for the kernel wherever
            it can run.

    Returns:
        out `[..., 512]` and lse `[...]`, the same bits on all devices.

    Raises:
        ValueError: there are Auto axes beside the manual ones; the mailboxes are too small.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
    """
    if not isinstance(lses.size, int):  # a batch that is open, in a program for export
        return _portable(outs, lses, None, axis_name=axis_name, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = [x for x, kind in kinds if kind == AxisType.Auto and mesh.shape[x] > 1]
    if auto:
        raise ValueError(
            f"exchange: got 'direct' beside the Auto axes {auto}, expected a jax.shard_map over all"
            " axes, or Explicit axes"
        )
    if mailboxes is None:
        mailboxes = get_mailboxes(lses.size, axis_name=axis_name, implementation=implementation)
    if mailboxes.rows < lses.size:
        raise ValueError(
            f"mailboxes: got some for {mailboxes.rows} partial rows, expected {lses.size}: those of"
            " get_mailboxes for this batch, queries and heads"
        )
    operands = _manual_axes.align([outs, lses, mailboxes.addresses])
    out, lse = _function(axis_name, implementation)(*operands)
    return out, lse


@functools.cache
def _function(axis_name: str, implementation: Implementation) -> Callable:
    static = {"axis_name": axis_name, "implementation": implementation}

    def local(*operands: jax.Array) -> list[jax.Array]:
        return exchange_p.bind(*operands, **static)

    @jax.custom_batching.custom_vmap
    def call(outs: jax.Array, lses: jax.Array, addresses: jax.Array) -> list[jax.Array]:
        dims = _merge.row_dims(lses.ndim - 1, ("addresses", "devices words"))
        return list(_mesh.spread(local, dims, [outs, lses, addresses]))

    @call.def_vmap
    def fold(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple:
        # The mapped axis becomes one of the row dimensions, behind the partials. Mailboxes for the
        # smaller number of rows are of no use.
        arrays = _operation.spread(axis_size, in_batched[:2], operands[:2])
        moved = [jnp.moveaxis(x, 0, 1) for x in arrays]
        return list(merge_over(*moved, None, **static)), [True, True]

    return _operation.inference_only("context-parallel decode", call)


def _addresses_results(
    index: jax.core.ShapedArray, *, axis_name: str, **_: object
) -> list[jax.core.ShapedArray]:
    shape = jax.lax.axis_size(axis_name), ADDRESS_WORDS
    return [_manual_axes.result([index], shape, jnp.uint32, frozenset([axis_name]))]


def _portable_addresses(index: jax.Array, *, axis_name: str, **_: object) -> list[jax.Array]:
    """Nobody reads them."""
    del index
    return [jnp.zeros((jax.lax.axis_size(axis_name), ADDRESS_WORDS), jnp.uint32)]


def _kernel_addresses(
    index: jax.Array, *, axis_name: str, rows: int, **_: object
) -> list[jax.Array]:
    """Gathers the addresses. Only calls that have an operand are shared by XLA."""
    own = _manual_axes.result([jax.typeof(index)], (1, ADDRESS_WORDS), jnp.uint32)
    address = jax.ffi.ffi_call(_ffi.ADDRESS_TARGET, own)(index, rows=np.int32(rows))
    return [_manual_axes.gather(address, axis_name, 0)]


def _results(
    outs: jax.core.ShapedArray,
    lses: jax.core.ShapedArray,
    addresses: jax.core.ShapedArray,
    *,
    axis_name: str,
    implementation: Implementation,
) -> list[jax.core.ShapedArray]:
    shape = _cache_shapes.check_merge(outs, lses)
    _dispatch.check_request(implementation, _refusal(outs, lses))
    operands, same = [outs, lses, addresses], frozenset([axis_name])
    return [
        _manual_axes.result(operands, (*shape.rows, shape.head_dim), outs.dtype, same),
        _manual_axes.result(operands, shape.rows, jnp.float32, same),
    ]


def _portable(
    outs: jax.Array,
    lses: jax.Array,
    addresses: jax.Array | None,
    *,
    axis_name: str,
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    del addresses
    gathered = (_manual_axes.gather(x, axis_name, 0) for x in (outs, lses))
    return _merge.merge_partials(*gathered, implementation=implementation)


def _kernel(
    outs: jax.Array, lses: jax.Array, addresses: jax.Array, **static: object
) -> Sequence[jax.Array]:
    """Calls the kernel on `[k, rows, 512]`."""
    results = _results(*map(jax.typeof, (outs, lses, addresses)), **static)
    k = outs.shape[0]
    flat = outs.reshape(k, -1, HEAD_DIM_V), lses.reshape(k, -1), addresses
    call = jax.ffi.ffi_call(_ffi.EXCHANGE_TARGET, _results(*map(jax.typeof, flat), **static))
    return [x.reshape(y.shape) for x, y in zip(call(*flat), results, strict=True)]


def _refusal(outs: jax.Array, lses: jax.Array, *_: jax.Array) -> str | None:
    if refusal := _dispatch.dtype_refusal(outs.dtype):
        return refusal
    if outs.shape[-1] != HEAD_DIM_V:
        return f"d = {outs.shape[-1]} is not {HEAD_DIM_V}"
    if lses.size > MAX_ROWS:
        return f"{lses.size} partial rows are more than {MAX_ROWS}"
    if (processes := jax.process_count()) > 1:
        return f"{processes} processes cannot write into each other's memory"
    return None


_operation.define(
    addresses_p,
    _operation.Rules(
        "context-parallel decode",
        _addresses_results,
        _kernel_addresses,
        _portable_addresses,
        collective=True,
    ),
)
_operation.define(
    exchange_p,
    _operation.Rules(
        "context-parallel decode", _results, _kernel, _portable, _refusal, collective=True
    ),
)
