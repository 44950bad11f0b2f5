"""The only place that checks arguments: dimensions, dtypes, static values.

Every error names the argument, what was got and what was expected.
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

KV_LORA_RANK = 512
ROPE_DIM = 64
HEAD_DIM_QK = KV_LORA_RANK + ROPE_DIM
HEAD_DIM_V = KV_LORA_RANK
PAGE_SIZE = 64
TileSchedulerMetaDataSize = 8

Dims = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """The dimensions of one decode call.

    Attributes:
        batch: requests, b.
        s_q: query tokens per request.
        h_q: query heads.
        h_kv: KV heads, a divisor of h_q.
        num_pages: pages in the pool.
        max_pages_per_seq: columns of the block table.
    """

    batch: int
    s_q: int
    h_q: int
    h_kv: int
    num_pages: int
    max_pages_per_seq: int

    @property
    def rows(self) -> int:
        """Packed query rows per request and KV head, R."""
        return self.s_q * self.h_q // self.h_kv

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output, `[b, s_q, h_q, 512]`."""
        return self.batch, self.s_q, self.h_q, HEAD_DIM_V

    @property
    def lse(self) -> tuple[int, int, int]:
        """Shape of the log-sum-exp, `[b, s_q, h_q]`."""
        return self.out[:-1]

    @property
    def is_trivial(self) -> bool:
        """True when there is no query or no key at all, so that nothing needs to run."""
        return 0 in (self.batch, self.rows, self.num_pages, self.max_pages_per_seq)


def as_arrays(**values: jax.Array | np.ndarray) -> tuple[jax.Array, ...]:
    """Takes JAX and NumPy arrays by name, and refuses what only a guess converts (lists, None)."""
    for name, value in values.items():
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a JAX or NumPy array")
    return tuple(jnp.asarray(value) for value in values.values())


def split_decode_shape(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> DecodeShape:
    """Checks the arrays of `mla_decode`, queries in two parts.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    check_shape("q_latent", q_latent, ("b", "s_q", "h_q", KV_LORA_RANK))
    check_shape("q_rope", q_rope, (*q_latent.shape[:3], ROPE_DIM))
    check_float("q_latent", q_latent)
    check_dtype("q_rope", q_rope, q_latent.dtype)
    return _decode_shape(q_latent, "kv_cache", kv_cache, block_table, cache_seqlens)


def joined_decode_shape(
    q: jax.Array, k_cache: jax.Array, block_table: jax.Array, cache_seqlens: jax.Array
) -> DecodeShape:
    """Checks the arrays of `flash_mla_with_kvcache`, queries in one array.

    Raises:
        ValueError: a shape is wrong.
        TypeError: a dtype is wrong.
    """
    check_shape("q", q, ("b", "s_q", "h_q", HEAD_DIM_QK))
    check_float("q", q)
    return _decode_shape(q, "k_cache", k_cache, block_table, cache_seqlens)


def decode_shape(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> DecodeShape:
    """Checks the operands of the primitive: queries in two parts, or the joined array twice."""
    if q_rope.shape[-1:] == (HEAD_DIM_QK,):
        check_shape("q_latent", q_latent, q_rope.shape)
        return joined_decode_shape(q_latent, kv_cache, block_table, cache_seqlens)
    return split_decode_shape(q_latent, q_rope, kv_cache, block_table, cache_seqlens)


def check_schedule(
    tile_scheduler_metadata: jax.Array, num_splits: jax.Array, batch: int, num_sm_parts: int | None
) -> int:
    """Checks the arrays of a schedule and returns its number of parts.

    Raises:
        ValueError: a shape is wrong, or `num_sm_parts` is not the schedule's.
        TypeError: a dtype is wrong.
    """
    name = "tile_scheduler_metadata"
    check_shape(name, tile_scheduler_metadata, ("num_sm_parts", TileSchedulerMetaDataSize))
    check_dtype(name, tile_scheduler_metadata, jnp.int32)
    check_shape("num_splits", num_splits, (batch + 1,))
    check_dtype("num_splits", num_splits, jnp.int32)
    parts = tile_scheduler_metadata.shape[0]
    if parts < 1:
        raise ValueError(f"{name}: got 0 rows, expected at least 1")
    if num_sm_parts not in (None, parts):
        raise ValueError(f"num_sm_parts: got {num_sm_parts}, expected the schedule's {parts}")
    return parts


def check_seqlens(cache_seqlens: jax.Array) -> int:
    """Checks the lengths that a schedule is made for and returns the batch."""
    check_shape("cache_seqlens", cache_seqlens, ("b",))
    check_dtype("cache_seqlens", cache_seqlens, jnp.int32)
    return cache_seqlens.shape[0]


def check_count(name: str, value: int) -> int:
    """Checks a static count, at least 1.

    Raises:
        TypeError: it is traced, or no integer.
        ValueError: it is below 1.
    """
    _refuse_array(name, value, "a Python int")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r}, expected a Python int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return int(value)


def check_positive(name: str, value: float) -> float:
    """Checks a static number, such as the softmax scale.

    Raises:
        TypeError: it is traced, an array, or no number.
        ValueError: it is not finite and positive in float32.
    """
    _refuse_array(name, value, "a Python or NumPy number")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, expected a Python or NumPy number")
    number = float(value)
    smallest, largest = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))
    if not (math.isfinite(number) and smallest <= number <= largest):
        raise ValueError(f"{name}: got {number}, expected a finite positive float32")
    return number


def check_flag(name: str, value: bool) -> bool:
    """Checks a static flag.

    Raises:
        TypeError: it is traced, or neither True nor False.
    """
    _refuse_array(name, value, "True or False")
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def check_head_dim_v(value: int) -> None:
    """Checks the head dimension of V, 512 in every model with this cache."""
    if check_count("head_dim_v", value) != HEAD_DIM_V:
        raise ValueError(f"head_dim_v: got {value}, expected {HEAD_DIM_V}")


def _decode_shape(
    q: jax.Array,
    cache_name: str,
    kv_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> DecodeShape:
    """Checks everything that does not depend on how the queries come."""
    batch, s_q, h_q, _ = q.shape
    check_shape(cache_name, kv_cache, ("num_pages", PAGE_SIZE, "h_kv", HEAD_DIM_QK))
    check_dtype(cache_name, kv_cache, q.dtype)
    check_shape("block_table", block_table, (batch, "max_pages_per_seq"))
    check_dtype("block_table", block_table, jnp.int32)
    check_shape("cache_seqlens", cache_seqlens, (batch,))
    check_dtype("cache_seqlens", cache_seqlens, jnp.int32)
    num_pages, _, h_kv, _ = kv_cache.shape
    if h_kv < 1 or h_q % h_kv:
        raise ValueError(
            f"{cache_name}: got {h_kv} KV heads (dimension 2), expected a divisor of the"
            f" {h_q} query heads"
        )
    return DecodeShape(batch, s_q, h_q, h_kv, num_pages, block_table.shape[1])


def check_shape(name: str, array: jax.Array, expected: Dims) -> None:
    """Compares a shape; names in `expected` stand for dimensions that are free."""
    wrong = len(array.shape) != len(expected) or any(
        isinstance(want, int) and have != want
        for have, want in zip(array.shape, expected, strict=True)
    )
    if wrong:
        dims = ", ".join(str(dim) for dim in expected)
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected [{dims}]")


def check_dtype(name: str, array: jax.Array, expected: jnp.dtype) -> None:
    """Compares a dtype."""
    if array.dtype != jnp.dtype(expected):
        raise TypeError(f"{name}: got {array.dtype}, expected {jnp.dtype(expected).name}")


def check_float(name: str, array: jax.Array) -> None:
    """Accepts the dtypes that a cache may have."""
    if array.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"{name}: got {array.dtype}, expected bfloat16, float16 or float32")


def _refuse_array(name: str, value: object, expected: str) -> None:
    """Refuses tracers and arrays where the value has to be known when the program is traced."""
    if isinstance(value, (jax.Array, np.ndarray)):
        kind = "a traced value" if isinstance(value, jax.core.Tracer) else "an array"
        raise TypeError(f"{name}: got {kind}, expected {expected}: it is compiled into the program")
