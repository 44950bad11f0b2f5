"""Our launches in a CUDA graph, back to back and without XLA: timed as the peers' are.

Under jit, XLA puts each call into a graph of its own inside its graph, so no call begins before the
one ahead has ended. In one graph they overlap a little, as kernels of one stream do.
"""

import ctypes
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from contenders import ours
from lanes import Lane
from workload import SOFTMAX_SCALE, Inputs, Row

from jax_flashmla._roofline import HEAD_DIM_QK, HEAD_DIM_V

NAME = "jax_flashmla replayed"
LIBRARY = "libflashmla_kernels.so"  # beside the runner
BFLOAT16 = 0
SPLIT_VECTOR_FLOATS = 4  # of PartialRow


class DecodeParams(ctypes.Structure):
    """`DecodeParams` of cuda/params.h."""

    _fields_ = (
        ("element_type", ctypes.c_int),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q_latent",
                "q_rope",
                "kv_cache",
                "block_table",
                "cache_seqlens",
                "tile_scheduler_metadata",
                "num_splits",
                "out",
                "lse",
                "partial_out",
                "partial_rows",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "q_latent_stride",
                "q_rope_stride",
                "batch",
                "s_q",
                "h_q",
                "h_kv",
                "num_pages",
                "max_pages_per_seq",
                "num_sm_parts",
            )
        ),
        ("softmax_scale", ctypes.c_float),
        ("causal", ctypes.c_bool),
        ("early_start", ctypes.c_bool),
        ("serial", ctypes.c_bool),
        ("delay_seed", ctypes.c_uint),
    )


def load(path: pathlib.Path) -> ctypes.CDLL | str:
    """The kernels as `make runner` builds them, or why they cannot be had."""
    if jax.default_backend() != "gpu":
        return "there is no GPU"
    if not path.exists():
        return f"no library at {path}: make runner"
    library = ctypes.CDLL(str(path))
    for name in ("flashmla_prepare", "flashmla_wait"):
        getattr(library, name).restype = ctypes.c_char_p
    library.flashmla_capture.restype = ctypes.c_void_p
    if library.flashmla_decode_params_bytes() != ctypes.sizeof(DecodeParams):
        return f"{path} has other parameters than replays.py: make runner"
    if error := library.flashmla_prepare():
        return error.decode()
    return library


def lane(library: ctypes.CDLL, row: Row, inputs: Inputs, kv_cache: jax.Array, calls: int) -> Lane:
    """A CUDA graph of ``calls`` back-to-back calls over the row's KV sets.

    Raises:
        RuntimeError: A launch fails, or the last result is not, bit for bit, that of the op in JAX.
    """
    results = _results(row, inputs.schedule[0].shape[0])
    tables = tuple(itertools.islice(itertools.cycle(inputs.tables), calls))
    jax.block_until_ready((inputs.q_latent, inputs.q_rope, tables, inputs.schedule, results))
    params = (DecodeParams * calls)(
        *(_params(row, inputs, table, kv_cache, results) for table in tables)
    )
    replay = ctypes.c_void_p(library.flashmla_capture(params, calls))
    alive = (inputs, kv_cache, results)  # what the graph reads and writes

    def start(held: object = alive) -> None:  # noqa: ARG001
        library.flashmla_start(replay)

    wait = functools.partial(_wait, library, replay)
    start()
    wait()
    given = (inputs.q_latent, inputs.q_rope, kv_cache, tables[-1], inputs.cache_seqlens)
    expected = np.asarray(jax.jit(ours)(*given, inputs.schedule))
    if not np.array_equal(_bits(np.asarray(results[0])), _bits(expected)):
        raise RuntimeError(f"{row.name}: the replayed result differs from the op's")
    return Lane(NAME, calls, start, wait)


def _wait(library: ctypes.CDLL, replay: ctypes.c_void_p) -> None:
    if error := library.flashmla_wait(replay):
        raise RuntimeError(error.decode())


def _results(row: Row, parts: int) -> tuple[jax.Array, ...]:
    """Arrays for out, lse, and the workspaces of partial results; only replays write them."""
    vectors = (row.batch, row.s_q, row.h_q)
    splits = (2 * parts, row.s_q * row.h_q)
    return (
        jnp.zeros((*vectors, HEAD_DIM_V), jnp.bfloat16),
        jnp.zeros(vectors, jnp.float32),
        jnp.zeros((*splits, HEAD_DIM_V), jnp.float16),
        jnp.zeros((*splits, SPLIT_VECTOR_FLOATS), jnp.float32),
    )


def _params(
    row: Row,
    inputs: Inputs,
    table: jax.Array,
    kv_cache: jax.Array,
    results: tuple[jax.Array, ...],
) -> DecodeParams:
    queries = (inputs.q_latent, inputs.q_rope)
    metadata, num_splits = inputs.schedule
    arrays = (*queries, kv_cache, table, inputs.cache_seqlens, metadata, num_splits, *results)
    return DecodeParams(
        BFLOAT16,
        *(array.unsafe_buffer_pointer() for array in arrays),
        HEAD_DIM_V,
        HEAD_DIM_QK - HEAD_DIM_V,
        row.batch,
        row.s_q,
        row.h_q,
        1,
        kv_cache.shape[0],
        table.shape[1],
        metadata.shape[0],
        SOFTMAX_SCALE,
        causal=True,
        early_start=True,
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16)
