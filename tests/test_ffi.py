"""Loading of the compiled extension, with stand-ins for it."""

import importlib
import types

import jax
import pytest

from jax_flashmla import _ffi

NAME = "jax_flashmla._cuda"


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType | Exception]:
    """What importing the extension gives: a module to return or an error to raise."""
    outcome = {}

    def import_module(name: str) -> types.ModuleType:
        assert name == NAME
        if isinstance(outcome[name], Exception):
            raise outcome[name]
        return outcome[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    return outcome


def test_targets_are_registered_for_cuda(extension: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"initialize": object(), "execute": object()}
    extension[NAME] = types.SimpleNamespace(
        registrations=lambda: {_ffi.DECODE_TARGET: stages},
        build_info=lambda: {"cuda_version": "13.0", "arch": "sm_90a"},
    )
    registered = []
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda *x, **options: registered.append((x, options))
    )
    assert _ffi.load.__wrapped__() == _ffi.Build("13.0", "sm_90a", None)
    assert registered == [((_ffi.DECODE_TARGET, stages), {"platform": "CUDA", "api_version": 1})]


def test_without_the_extension_the_installation_is_portable(extension: dict) -> None:
    extension[NAME] = ModuleNotFoundError(name=NAME)
    build = _ffi.load.__wrapped__()
    assert (build.cuda_version, build.arch) == (None, None)
    assert "portable-only installation" in build.missing


def test_an_extension_that_does_not_load_says_why(extension: dict) -> None:
    extension[NAME] = ImportError("undefined symbol: cudaLaunchKernel")
    assert "undefined symbol: cudaLaunchKernel" in _ffi.load.__wrapped__().missing
