"""Every public op on whole arrays, the ways in which it may be sharded, and the kinds of mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

import jax_flashmla
from jax_flashmla import cache, mla
from jax_flashmla.testing import logits

Arrays = tuple[jax.Array, ...]

SCALE = 0.1
QUERY_SIGMA = 1 / (SCALE * logits.KEY_SIGMA * 576**0.5)  # logits of standard deviation 1
AXES = ("data", "model")
NONE, DATA, MODEL = P(), P("data"), P(None, None, "model")
BOTH = P("data", None, "model")
HEADS_OF = MODEL, MODEL, MODEL, NONE, NONE

decode = functools.partial(jax_flashmla.mla_decode, softmax_scale=SCALE)


def decode_with_schedule(*arrays: jax.Array) -> Arrays:
    _, queries, heads, _ = arrays[0].shape
    schedule = jax_flashmla.get_mla_metadata(arrays[4], queries * heads, 1, num_sm_parts=3)
    return decode(*arrays, schedule=schedule)


def flash(*arrays: jax.Array) -> Arrays:
    return jax_flashmla.flash_mla_with_kvcache(*arrays, 512, None, None)


def gather(*arrays: jax.Array) -> Arrays:
    return (cache.gather(*arrays),)


def append(*arrays: jax.Array) -> Arrays:
    rotation = dict(zip(("cos", "sin"), arrays[4:], strict=bool(arrays[4:])))
    return (cache.append(*arrays[:4], **rotation),)


def append_projected(*arrays: jax.Array) -> Arrays:
    names = "latent_norm", "cos", "sin"
    rest = dict(zip(names, arrays[3:], strict=True))
    return (cache.append_projected(*arrays[:3], **rest, norm_eps=1e-6),)


def absorbed_queries(*arrays: jax.Array) -> Arrays:
    return mla.absorbed_queries(*arrays)


def schedule(lengths: jax.Array) -> Arrays:
    return tuple(jax_flashmla.get_mla_metadata(lengths, 16, 1, num_sm_parts=3))


@dataclasses.dataclass(frozen=True)
class Call:
    """An op on whole arrays, how they are sharded, and the shardings of the results.

    `paged` is the position of the table or the slots, which name pages of the device where the
    pool is sharded over `shards` devices.
    """

    function: Callable[..., Arrays]
    arrays: tuple[np.ndarray, ...]
    specs: tuple[P, ...]
    out_specs: tuple[P, ...]
    paged: int | None = None
    shards: int = 1

    def whole(self) -> tuple[np.ndarray, ...]:
        """The arrays of one device, whose table names pages of the whole pool."""
        arrays = list(self.arrays)
        if self.paged is not None:
            indices = arrays[self.paged]
            pages = self.arrays[2 if self.function is decode else 0].shape[0] // self.shards
            size = pages * (64 if self.function in (append, append_projected) else 1)
            shard = np.arange(len(indices), dtype=np.int32) // (len(indices) // self.shards)
            moved = indices + size * shard.reshape(-1, *[1] * (indices.ndim - 1))
            arrays[self.paged] = np.where(indices < 0, indices, moved)
        return tuple(arrays)

    def expected(self) -> Arrays:
        """The result on one device."""
        return self.function(*self.whole())


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays, and the number of devices that batch and pool are divided among."""

    batch: int = 4
    queries: int = 2
    heads: int = 8
    kv_heads: int = 1
    pages: int = 8
    rows: int = 6
    shards: int = 2
    dtype: str = "float32"


def decode_arrays(sizes: Sizes) -> Arrays:
    rows = sizes.batch, sizes.queries, sizes.heads
    pages = sizes.pages // sizes.shards  # each device could hold the pages of any request
    table = np.random.default_rng(1).integers(0, pages, (sizes.batch, 3), np.int32)
    lengths = np.resize(np.int32([0, 70, 192, 1]), sizes.batch)
    queries = (normal(sizes.dtype, *rows, d, sigma=QUERY_SIGMA) for d in (512, 64))
    pool = normal(sizes.dtype, sizes.pages, 64, sizes.kv_heads, 576, sigma=logits.KEY_SIGMA)
    return *queries, pool, table, lengths


def append_arrays(sizes: Sizes) -> Arrays:
    tokens = sizes.pages // sizes.shards * 64
    slots = np.random.default_rng(2).permutation(tokens)[: sizes.rows].astype(np.int32)
    slots[1::4] = -1
    floats = [(sizes.pages, 64, 1, 576), (sizes.rows, 512), (sizes.rows, 64)]
    rotation = (normal("float32", sizes.rows, 32) for _ in range(2))
    return *(normal(sizes.dtype, *shape) for shape in floats), slots, *rotation


def query_arrays(sizes: Sizes, width: int = 128, nope: int = 128) -> Arrays:
    rows, heads = (sizes.batch, sizes.queries), sizes.heads
    return (
        normal(sizes.dtype, *rows, width),
        normal(sizes.dtype, width, heads, nope + 64, sigma=width**-0.5),
        normal(sizes.dtype, heads, nope, 512, sigma=nope**-0.5),
        *(normal("float32", *rows, 32) for _ in range(2)),
    )


def normal(dtype: str, *shape: int, sigma: float = 1.0) -> np.ndarray:
    drawn = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return (drawn * np.float32(sigma)).astype(jnp.dtype(dtype))


def calls(sizes: Sizes) -> dict[str, Call]:
    """Each op under each sharding, by name."""
    arrays = decode_arrays(sizes)
    joined = np.concatenate(arrays[:2], axis=-1)
    grouped = decode_arrays(dataclasses.replace(sizes, kv_heads=4))
    new = append_arrays(sizes)
    projected = new[0], np.concatenate(new[1:3], axis=-1), new[3], normal(sizes.dtype, 512)
    rows = sizes.batch, sizes.heads
    partials = normal(sizes.dtype, 3, *rows, 32), normal("float32", 3, *rows)
    both, data = (BOTH, BOTH, NONE, DATA, DATA), P("data")
    hidden, by_head = query_arrays(sizes), (P(None, "model"), P("model"))
    found = {
        "decode, batch": Call(decode, arrays, (DATA, DATA, NONE, DATA, DATA), (DATA, data)),
        "decode, heads": Call(decode, arrays, (MODEL, MODEL, NONE, NONE, NONE), (MODEL,) * 2),
        "decode, batch and heads": Call(decode, arrays, both, (BOTH,) * 2),
        "decode, scheduled before": Call(decode_with_schedule, arrays, both, (BOTH,) * 2),
        "decode, pool with the batch": Call(
            decode, arrays, (BOTH, BOTH, DATA, DATA, DATA), (BOTH,) * 2, paged=3
        ),
        "decode, KV heads": Call(decode, grouped, HEADS_OF, (MODEL,) * 2),
        "decode, FlashMLA's form": Call(
            flash, (joined, *arrays[2:]), (BOTH, NONE, DATA, DATA), (BOTH, P("data", "model"))
        ),
        "gather, batch": Call(gather, arrays[2:], (NONE, DATA, DATA), (DATA,)),
        "gather, KV heads": Call(gather, grouped[2:], (MODEL, DATA, DATA), (BOTH,)),
        "gather, pool with the batch": Call(
            gather, arrays[2:], (DATA, DATA, DATA), (DATA,), paged=1
        ),
        "append, one pool": Call(append, new[:4], (NONE,) * 4, (NONE,)),
        "append, pool with the rows": Call(append, new, (DATA,) * 6, (DATA,), paged=3),
        "append_projected, pool with the rows": Call(
            append_projected,
            (*projected, *new[4:]),
            (DATA, DATA, DATA, NONE, DATA, DATA),
            (DATA,),
            paged=2,
        ),
        "absorbed_queries, batch": Call(
            absorbed_queries, hidden, (DATA, NONE, NONE, DATA, DATA), (DATA,) * 2
        ),
        "absorbed_queries, heads": Call(
            absorbed_queries, hidden, (NONE, *by_head, NONE, NONE), (MODEL,) * 2
        ),
        "absorbed_queries, batch and heads": Call(
            absorbed_queries, hidden, (DATA, *by_head, DATA, DATA), (BOTH,) * 2
        ),
        "merge": Call(
            jax_flashmla.merge_partials,
            partials,
            (P(None, "data", "model"),) * 2,
            (P("data", "model"),) * 2,
        ),
    }
    return {name: dataclasses.replace(call, shards=sizes.shards) for name, call in found.items()}


def placed(call: Call, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    pairs = zip(call.arrays, call.specs, strict=True)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]


def mapped(call: Call, mesh: jax.sharding.Mesh, axis: str | None = None, **options: bool) -> Call:
    """The call inside a shard_map over all axes, or one."""
    specs, out_specs = call.specs, call.out_specs
    if axis:
        specs, out_specs, options["axis_names"] = _only(axis, specs), _only(axis, out_specs), {axis}

    def function(*arrays: jax.Array) -> Arrays:
        return tuple(call.function(*arrays))

    over = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, **options)
    return dataclasses.replace(call, function=over)


def _only(axis: str, specs: Sequence[P]) -> tuple[P, ...]:
    return tuple(P(*(x if x == axis else None for x in spec)) for spec in specs)


def mesh_of(shape: tuple[int, int], kind: AxisType, devices: Sequence) -> jax.sharding.Mesh:
    """A mesh over "data" and "model"."""
    return jax.make_mesh(shape, AXES, axis_types=(kind, kind), devices=devices)


# How a call meets a mesh of that kind of axes.
KINDS: dict[str, tuple[AxisType, Callable[[Call, jax.sharding.Mesh], Call]]] = {
    "Auto": (AxisType.Auto, lambda call, _: call),
    "Explicit": (AxisType.Explicit, lambda call, _: call),
    "shard_map": (AxisType.Auto, mapped),
    "shard_map, unchecked": (AxisType.Auto, functools.partial(mapped, check_vma=False)),
    "shard_map over one Explicit axis": (AxisType.Explicit, functools.partial(mapped, axis="data")),
    "shard_map over one Auto axis": (AxisType.Auto, functools.partial(mapped, axis="data")),
}
