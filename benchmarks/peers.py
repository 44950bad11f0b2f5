r"""The peers that run beside us: op libraries of vLLM's wheel, as torch operations.

A wheel is fetched without its dependencies and unpacked anywhere; nothing of vLLM is imported:

    pip download --no-deps vllm==0.23.0 --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64
    unzip vllm-*.whl 'vllm/_flashmla_C.abi3.so' 'vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so'

Each call gets the same queries, tables and pool as ours, the pool without a copy (DLPack).
"""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import numpy as np
from lanes import Lane
from workload import PAGE_SIZE, SOFTMAX_SCALE, Inputs, Row

from jax_flashmla._roofline import HEAD_DIM_QK, HEAD_DIM_V

if TYPE_CHECKING:
    import torch

HEAD_DIM_ROPE = HEAD_DIM_QK - HEAD_DIM_V
# A peer called in a wrong way is wrong by far more than bfloat16 rounds.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row's arguments as torch tensors."""

    q_latent: "torch.Tensor"  # [b, s_q, h_q, 512]
    q_rope: "torch.Tensor"  # [b, s_q, h_q, 64]
    kv_cache: "torch.Tensor"  # [num_pages, 64, 1, 576], the pool itself
    tables: "tuple[torch.Tensor, ...]"  # int32 [b, max_pages_per_seq]
    cache_seqlens: "torch.Tensor"  # int32 [b]


Call = Callable[["torch.Tensor"], "torch.Tensor"]  # block table to out [b, s_q, h_q, 512]


@dataclasses.dataclass(frozen=True)
class Peer:
    """An op library.

    Attributes:
        name: As in results, and in peers-h200.json where it is the same build.
        module: File inside an installed vLLM.
        prepare: Schedules a row once; returns what is timed.
    """

    name: str
    module: str
    prepare: Callable[[Problem], Call]

    def load(self, path: pathlib.Path | None) -> str | None:
        """Loads the library; returns why that is impossible, None if it worked."""
        import_spec = importlib.util.find_spec
        if path is None and (found := import_spec("vllm")) and found.submodule_search_locations:
            path = pathlib.Path(found.submodule_search_locations[0]) / self.module
        if path is None or not path.exists():
            return f"no library at {path}" if path else "no library given and no vLLM installed"
        if import_spec("torch") is None:
            return "torch is not installed"
        if jax.default_backend() != "gpu":
            return "there is no GPU"
        import torch

        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            return f"{path.name} does not load: {str(error).splitlines()[0]}"
        return None

    def lane(self, row: Row, inputs: Inputs, kv_cache: jax.Array, calls: int) -> Lane:
        """A CUDA graph of back-to-back calls over the row's KV sets.

        Raises:
            RuntimeError: The op fails, or its result is not attention.
        """
        import torch

        problem = as_torch(inputs, kv_cache)
        call = self.prepare(problem)
        stream = _side_stream()
        with torch.cuda.stream(stream):
            out = call(problem.tables[0])
        stream.synchronize()
        if not (error := _error(problem, row, out)) < TOLERANCE:
            raise RuntimeError(f"relative error {error:.1e} against float32")

        graph = torch.cuda.CUDAGraph()
        # Threads of XLA may call CUDA meanwhile; one capture of hundreds failed, perhaps for that.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for table in itertools.islice(itertools.cycle(problem.tables), calls):
                out = call(table)

        start = functools.partial(_replay, graph, (problem, call))
        return Lane(self.name, calls, start, torch.cuda.synchronize)


@functools.cache
def _side_stream() -> "torch.cuda.Stream":
    """For all captures, so that a run of many rows is not a process of many streams."""
    import torch

    return torch.cuda.Stream()


def _replay(graph: "torch.cuda.CUDAGraph", read: object) -> None:  # noqa: ARG001
    """Replays a graph; what it reads lives as long as its lane."""
    graph.replay()


def as_torch(inputs: Inputs, kv_cache: jax.Array) -> Problem:
    """The same arguments for torch; the pool is shared, the rest copied over the host."""
    import torch

    def copied(array: jax.Array) -> "torch.Tensor":
        if array.dtype == jax.numpy.bfloat16:
            bits = torch.from_numpy(np.asarray(array).view(np.int16).copy())
            return bits.cuda().view(torch.bfloat16)
        return torch.from_numpy(np.array(array)).cuda()

    return Problem(
        copied(inputs.q_latent),
        copied(inputs.q_rope),
        torch.from_dlpack(kv_cache),
        # Page 0 behind the end: what a peer does with -1 there is not our question.
        tuple(copied(table).clamp_(min=0) for table in inputs.tables),
        copied(inputs.cache_seqlens),
    )


def prepare_flashmla(problem: Problem) -> Call:
    """FlashMLA as vLLM builds it; the first call makes the schedule that the others reuse."""
    import torch

    q = torch.cat([problem.q_latent, problem.q_rope], dim=-1)
    causal = q.shape[1] > 1

    def decode(table: "torch.Tensor", *schedule: "torch.Tensor | None") -> tuple:
        return torch.ops._flashmla_C.dense_decode_fwd(
            q,
            problem.kv_cache,
            HEAD_DIM_V,
            problem.cache_seqlens,
            table,
            SOFTMAX_SCALE,
            causal,
            *schedule,
            None,  # out
        )

    _, _, *schedule = decode(problem.tables[0], None, None)
    return lambda table: decode(table, *schedule)[0]


def prepare_fa3(problem: Problem) -> Call:
    """FlashAttention-3's MLA path: the latent part of q as q_v, the pool as views of K and V."""
    import torch

    ops = torch.ops._vllm_fa3_C
    arguments = fa3_arguments(problem)
    scheduled = _by_name(ops.get_scheduler_metadata.default, fa3_scheduling(problem))
    arguments["scheduler_metadata"] = ops.get_scheduler_metadata(**scheduled)
    given = _by_name(ops.fwd.default, arguments)

    def decode(table: "torch.Tensor") -> "torch.Tensor":
        return ops.fwd(**(given | {"page_table": table}))[0]

    return decode


def fa3_arguments(problem: Problem) -> dict[str, object]:
    """What FA3's op gets beside the table and the schedule; all other arguments are None."""
    return {
        "q": problem.q_rope,
        "k": problem.kv_cache[..., HEAD_DIM_V:],
        "v": problem.kv_cache[..., :HEAD_DIM_V],
        "q_v": problem.q_latent,
        "seqused_k": problem.cache_seqlens,
        "softmax_scale": SOFTMAX_SCALE,
        "is_causal": problem.q_rope.shape[1] > 1,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "is_rotary_interleaved": True,
        "num_splits": 0,  # its own choice
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }


def fa3_scheduling(problem: Problem) -> dict[str, object]:
    """What FA3's scheduler gets; all other arguments are None."""
    b, s_q, h_q, _ = problem.q_rope.shape
    return {
        "batch_size": b,
        "max_seqlen_q": s_q,
        "max_seqlen_k": problem.tables[0].shape[1] * PAGE_SIZE,
        "num_heads": h_q,
        "num_heads_k": 1,
        "headdim": HEAD_DIM_ROPE,
        "headdim_v": HEAD_DIM_V,
        "qkv_dtype": problem.q_rope.dtype,
        "seqused_k": problem.cache_seqlens,
        "page_size": PAGE_SIZE,
        "max_seqlen_k_new": 0,
        "is_causal": s_q > 1,
        "window_size_left": -1,
        "window_size_right": -1,
        "has_softcap": False,
        "num_splits": 0,
        "sm_margin": 0,
    }


def _by_name(op: object, given: dict[str, object]) -> dict[str, object]:
    """Every argument of an op by its name, None where nothing is given."""
    names = [argument.name for argument in op._schema.arguments]
    if unknown := given.keys() - set(names):
        raise RuntimeError(f"the op takes no {sorted(unknown)}: {op._schema}")
    return {name: given.get(name) for name in names}


def _error(problem: Problem, row: Row, out: "torch.Tensor") -> float:
    """Relative error of the last request's output, ||out - truth|| / ||truth||, in float32."""
    import torch

    length, s_q = int(row.lengths[-1]), row.s_q
    pages = problem.tables[0][-1][: -(-length // PAGE_SIZE)].long()
    keys = problem.kv_cache[pages, :, 0].reshape(-1, HEAD_DIM_QK)[:length].float()
    q = torch.cat([problem.q_latent[-1], problem.q_rope[-1]], dim=-1).float()
    logits = torch.einsum("shd,kd->shk", q, keys) * SOFTMAX_SCALE
    limits = length - (s_q - 1 - torch.arange(s_q, device=keys.device))
    hidden = torch.arange(length, device=keys.device) >= limits[:, None, None]
    weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
    truth = torch.einsum("shk,kd->shd", weights, keys[:, :HEAD_DIM_V])
    return float((out[-1].float() - truth).norm() / truth.norm())


FLASHMLA = Peer("vllm_flashmla", "_flashmla_C.abi3.so", prepare_flashmla)
FA3 = Peer("fa3", "vllm_flash_attn/_vllm_fa3_C.abi3.so", prepare_fa3)
