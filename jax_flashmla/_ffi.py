"""The compiled extension: what is built, and the registration of its FFI targets."""

import dataclasses
import functools
import importlib

import jax

SCHEDULE_TARGET = "jax_flashmla_schedule"
DECODE_TARGET = "jax_flashmla_decode"
APPEND_TARGET = "jax_flashmla_append"
APPEND_PROJECTED_TARGET = "jax_flashmla_append_projected"
ABSORBED_ATTENTION_TARGET = "jax_flashmla_absorbed_attention"
ABSORBED_QUERIES_TARGET = "jax_flashmla_absorbed_queries"
GATHER_TARGET = "jax_flashmla_gather"
MERGE_TARGET = "jax_flashmla_merge"
ADDRESS_TARGET = "jax_flashmla_address"
EXCHANGE_TARGET = "jax_flashmla_exchange"
TARGETS = (
    SCHEDULE_TARGET,
    DECODE_TARGET,
    APPEND_TARGET,
    APPEND_PROJECTED_TARGET,
    ABSORBED_ATTENTION_TARGET,
    ABSORBED_QUERIES_TARGET,
    GATHER_TARGET,
    MERGE_TARGET,
    ADDRESS_TARGET,
    EXCHANGE_TARGET,
)
NO_EXTENSION = "a portable-only installation, built without nvcc, or the source folder itself"


@dataclasses.dataclass(frozen=True)
class Build:
    """What this installation holds.

    Attributes:
        cuda_version: the CUDA version the kernels were built with, None without kernels.
        arch: the architecture they were built for, None without kernels.
        missing: why there are no kernels, None when there are.
    """

    cuda_version: str | None
    arch: str | None
    missing: str | None


@functools.cache
def load() -> Build:
    """Imports the extension and registers its targets, once per process.

    Registration is safe without a GPU: JAX queues it until a CUDA backend exists.
    """
    try:
        extension = importlib.import_module("jax_flashmla._cuda")
    except ModuleNotFoundError:
        return Build(None, None, NO_EXTENSION)
    except ImportError as error:
        return Build(None, None, f"the compiled extension does not load: {error}")
    for target, stages in extension.registrations().items():
        jax.ffi.register_ffi_target(target, stages, platform="CUDA", api_version=1)
    info = extension.build_info()
    return Build(str(info["cuda_version"]), str(info["arch"]), None)
