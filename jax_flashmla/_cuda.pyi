"""The compiled extension: it only holds the registrations of the FFI handlers."""

from types import CapsuleType

def registrations() -> dict[str, dict[str, CapsuleType]]:
    """Returns the handlers by target name and stage, for `jax.ffi.register_ffi_target`."""

def build_info() -> dict[str, object]:
    """Returns what the handlers were built with: `cuda_version` ("13.0") and `arch` ("sm_90a")."""
