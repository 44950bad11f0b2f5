"""Paged multi-head latent attention (MLA) decode for JAX, on Hopper GPUs and everywhere else."""

from jax_flashmla import _dispatch, _ffi
from jax_flashmla._api import flash_mla_with_kvcache, get_mla_metadata, mla_decode
from jax_flashmla._dispatch import status
from jax_flashmla._shapes import TileSchedulerMetaDataSize

__all__ = [
    "TileSchedulerMetaDataSize",
    "__version__",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "mla_decode",
    "status",
]

__version__ = _dispatch.version()

_ffi.load()
