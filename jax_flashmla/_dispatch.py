"""Which path runs, the kernel or the portable lowering, and why."""

import dataclasses
import warnings
from importlib import metadata
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_flashmla import _ffi

Implementation = Literal["cuda", "xla"] | None

KERNEL_COMPUTE_CAPABILITY = "9.0"
H200_SMS = 132


@dataclasses.dataclass(frozen=True)
class Status:
    """What is installed and what a bfloat16 decode step will run on the default device.

    Attributes:
        version: the version of jax_flashmla.
        cuda: the CUDA version the kernels were built with, None in a portable-only installation.
        device: the default device, with its compute capability on a GPU.
        path: "kernel" or "portable".
        reason: why that path runs.
    """

    version: str
    cuda: str | None
    device: str
    path: Literal["kernel", "portable"]
    reason: str

    def __str__(self) -> str:
        build = f"CUDA {self.cuda}" if self.cuda else "no kernels"
        return f"jax_flashmla {self.version} ({build}) on {self.device}: {self.path}, {self.reason}"


def version() -> str:
    """Returns the version of the installed package, "0+unknown" in a bare source tree."""
    try:
        return metadata.version("jax_flashmla")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def local_gpu() -> jax.Device | None:
    """Returns the first CUDA device of this process, None where JAX sees none."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None


def num_sms() -> int:
    """Returns the number of SMs of the local GPU, an H200's where none is visible."""
    return int(getattr(local_gpu(), "core_count", H200_SMS))


def status() -> Status:
    """Says what is installed and which path a bfloat16 decode step will take, and why.

    Returns:
        A `Status`: version, CUDA version of the build or None, device, path and reason. Printing
        it gives one line.
    """
    on_gpu = jax.default_backend() == "gpu" and local_gpu() is not None
    device = local_gpu() if on_gpu else jax.local_devices()[0]
    refusal = _cuda_refusal() if on_gpu else _not_cuda(device.platform)
    capability = f" (compute capability {device.compute_capability})" if on_gpu else ""
    return Status(
        version=version(),
        cuda=_ffi.load().cuda_version,
        device=device.device_kind + capability,
        path="portable" if refusal else "kernel",
        reason=refusal or "the kernel is built for this GPU",
    )


def dtype_refusal(dtype: DTypeLike) -> str | None:
    """Says why no kernel computes in a dtype, None when one does."""
    return "float32 has no kernel, bfloat16 and float16 have" if dtype == jnp.float32 else None


def check_request(implementation: Implementation, refusal: str | None) -> None:
    """Rejects at trace time what no later lowering could make right.

    Args:
        implementation: the `implementation` argument of the public functions.
        refusal: why the operands have no kernel, None when they have one.

    Raises:
        ValueError: for an unknown name, or "cuda" with operands that have no kernel.
    """
    if implementation not in (None, "cuda", "xla"):
        raise ValueError(f"implementation: got {implementation!r}, expected None, 'cuda' or 'xla'")
    if implementation == "cuda" and refusal:
        raise ValueError(f"implementation: got 'cuda', which cannot run: {refusal}")


def takes_kernel(
    operation: str, implementation: Implementation, refusal: str | None, platform: str
) -> bool:
    """Decides, while lowering for `platform`, whether the kernel runs.

    A GPU that is not visible is taken to be a Hopper GPU with the kernels installed: that is how
    a program is lowered or exported for CUDA on a CPU host. Handlers are looked up by name when
    the program is loaded, so the extension need not be there either.

    Args:
        operation: what the warning calls it.
        implementation: "xla" for the portable lowering, "cuda" for the kernel or an error, None
            for the kernel where it can run. None warns when a CUDA device gets the portable one.
        refusal: why the operands have no kernel, None when they have one.
        platform: "cuda", or anything else.

    Raises:
        RuntimeError: "cuda" was asked for and cannot run; the text says why.
    """
    if implementation == "xla":
        return False
    refusal = (refusal or _cuda_refusal()) if platform == "cuda" else _not_cuda(platform)
    if refusal and implementation == "cuda":
        raise RuntimeError(f"implementation: got 'cuda', which cannot run here: {refusal}")
    if refusal and platform == "cuda":
        warnings.warn(f"{operation} takes the slow portable path: {refusal}", stacklevel=2)
    return refusal is None


def _cuda_refusal() -> str | None:
    """Says why no kernel can run on the local GPU, None when kernels can."""
    gpu, missing = local_gpu(), _ffi.load().missing
    if gpu is None:
        return None
    if missing:
        return f"the kernels are not built ({missing})"
    if gpu.compute_capability != KERNEL_COMPUTE_CAPABILITY:
        return (
            f"{gpu.device_kind} has compute capability {gpu.compute_capability},"
            f" the kernel needs {KERNEL_COMPUTE_CAPABILITY} (Hopper)"
        )
    return None


def _not_cuda(platform: str) -> str:
    return f"the kernel needs CUDA, the platform is {platform}"
