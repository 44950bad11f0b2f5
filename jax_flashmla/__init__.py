"""Paged multi-head latent attention (MLA) decode for JAX, on Hopper GPUs and everywhere else."""

from jax_flashmla import _dispatch, _ffi, cache, context_parallel, exporting, mla, rope
from jax_flashmla._api import flash_mla_with_kvcache, get_mla_metadata, mla_decode
from jax_flashmla._dispatch import status
from jax_flashmla._merge import merge_partials
from jax_flashmla._shapes import TileSchedulerMetaDataSize

__all__ = [
    "TileSchedulerMetaDataSize",
    "__version__",
    "cache",
    "context_parallel",
    "exporting",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_partials",
    "mla",
    "mla_decode",
    "rope",
    "status",
]

__version__ = _dispatch.version()

_ffi.load()
