"""What CUDA gets, seen from a host without a GPU: the lowered text and the choice of path."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import _dispatch, _ffi

ROWS = (2, 3, 8)  # b, s_q, h_q
PARTS = 7
BUILT = _ffi.Build("13.0", "sm_90a", None)
NOT_BUILT = _ffi.Build(None, None, "no nvcc")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Stands for a CUDA device of JAX."""

    device_kind: str = "NVIDIA H200"
    compute_capability: str = "9.0"
    core_count: int = 132
    platform: str = "gpu"


A100 = Gpu("NVIDIA A100", "8.0", 108)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Sets what the host has: a GPU or none, kernels or none."""

    def pretend(gpu: Gpu | None, build: _ffi.Build = NOT_BUILT) -> None:
        monkeypatch.setattr(_dispatch, "local_gpu", lambda: gpu)
        monkeypatch.setattr(_ffi, "load", lambda: build)

    pretend(None)
    return pretend


def split_arrays(h_kv: int = 1, dtype: jnp.dtype = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    shapes = [(*ROWS, 512), (*ROWS, 64), (9, 64, h_kv, 576), (2, 4), (2,)]
    dtypes = [dtype] * 3 + [jnp.int32] * 2
    return [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]


def joined_arrays() -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((*ROWS, 576), jnp.bfloat16), *split_arrays()[2:]]


def lowered(function: Callable, *arrays: jax.ShapeDtypeStruct, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def operations(text: str) -> list[str]:
    return re.findall(r"stablehlo\.(\w+)", text)


def custom_calls(text: str) -> dict[str, str]:
    """The line of each custom call by its target."""
    return {x[1]: x[0] for x in re.finditer(r"stablehlo\.custom_call @(\w+)\(.*", text)}


def decode(*arrays: jax.Array, **options: object) -> tuple[jax.Array, jax.Array]:
    return jax_flashmla.mla_decode(*arrays, softmax_scale=0.1, num_sm_parts=PARTS, **options)


def flash(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    metadata = jax_flashmla.get_mla_metadata(arrays[3], 24, 1, num_sm_parts=PARTS)
    return jax_flashmla.flash_mla_with_kvcache(*arrays, 512, *metadata)


@pytest.mark.usefixtures("host")
def test_decode_is_two_custom_calls_and_nothing_else() -> None:
    text = lowered(decode, *split_arrays())
    assert operations(text) == ["custom_call", "custom_call"]
    calls = custom_calls(text)
    assert "@jax_flashmla_schedule(%arg4)" in calls["jax_flashmla_schedule"]
    operands = "(%arg0, %arg1, %arg2, %arg3, %arg4, %0#0, %0#1)"
    assert f"@jax_flashmla_decode{operands}" in calls["jax_flashmla_decode"]


@pytest.mark.usefixtures("host")
def test_results_are_out_lse_and_workspace() -> None:
    text = lowered(decode, *split_arrays(h_kv=2, dtype=jnp.float16))
    results = custom_calls(text)["jax_flashmla_decode"].split("-> ")[1]
    shapes = ["2x3x8x512xf16", "2x3x8xf32", f"{2 * PARTS}x2x12x512xf16", f"{2 * PARTS}x2x12x4xf32"]
    assert results == "(" + ", ".join(f"tensor<{shape}>" for shape in shapes) + ")"
    schedule = custom_calls(text)["jax_flashmla_schedule"].split("-> ")[1]
    assert schedule == "(tensor<7x8xi32>, tensor<3xi32>)"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("causal", [True, False])
def test_attributes_have_the_types_of_the_handler(causal: bool) -> None:
    call = custom_calls(lowered(functools.partial(decode, causal=causal), *split_arrays()))
    attributes = re.search(r"mhlo\.backend_config = \{(.*?)\}", call["jax_flashmla_decode"])[1]
    assert attributes == f"causal = {str(causal).lower()}, softmax_scale = 1.000000e-01 : f32"


@pytest.mark.usefixtures("host")
def test_flashmla_form_passes_the_joined_queries_twice_without_a_copy() -> None:
    text = lowered(flash, *joined_arrays())
    assert "@jax_flashmla_decode(%arg0, %arg0, %arg1, %arg2, %arg3, " in text
    moving = {"slice", "concatenate", "pad", "gather", "dynamic_slice", "copy"}
    assert not moving & set(operations(text))


@pytest.mark.usefixtures("host")
def test_layers_share_one_schedule() -> None:
    def step(*arrays: jax.Array) -> jax.Array:
        schedule = jax_flashmla.get_mla_metadata(arrays[4], 24, 1)
        for _ in range(3):
            out, _ = jax_flashmla.mla_decode(*arrays, softmax_scale=0.1, schedule=schedule)
            arrays = out, *arrays[1:]
        return out

    text = lowered(step, *split_arrays())
    assert text.count("@jax_flashmla_schedule") == 1
    assert operations(text) == ["custom_call"] * 4


@pytest.mark.usefixtures("host")
def test_vmap_lowers_to_one_call_of_the_larger_batch() -> None:
    arrays = split_arrays()
    mapped = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in arrays]
    text = lowered(jax.vmap(decode, (0, 0, None, 0, 0)), *mapped[:2], arrays[2], *mapped[3:])
    call = custom_calls(text)["jax_flashmla_decode"]
    assert "tensor<10x3x8x512xbf16>, tensor<10x3x8x64xbf16>, tensor<9x64x1x576xbf16>" in call
    assert set(operations(text)) == {"custom_call", "reshape"}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("sharded", [(0, 1, 3, 4), (4,)], ids=str)
def test_shard_map_lowers_to_calls_of_the_local_batch(sharded: tuple[int, ...]) -> None:
    devices = jax.local_devices(backend="cpu")[:2]
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(auto,), devices=devices)
    specs = tuple(jax.P("data") if i in sharded else jax.P() for i in range(5))
    whole = [
        jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype) if i in sharded else x
        for i, x in enumerate(split_arrays())
    ]
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=jax.P("data"))
    assert "tensor<2x3x8x512xbf16>" in custom_calls(lowered(mapped, *whole))["jax_flashmla_decode"]


@pytest.mark.usefixtures("host")
def test_other_platforms_get_the_portable_lowering() -> None:
    for platform in ("cpu", "rocm"):
        assert not custom_calls(lowered(decode, *split_arrays(), platform=platform))


def takes_kernel(**options: object) -> bool:
    dtype = options.pop("dtype", jnp.bfloat16)
    text = lowered(functools.partial(decode, **options), *split_arrays(dtype=dtype))
    return "jax_flashmla_decode" in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", [None, "cuda"])
def test_kernel_where_it_can_run(host: Callable, implementation: str, dtype: jnp.dtype) -> None:
    for gpu, build in [(None, NOT_BUILT), (None, BUILT), (Gpu(), BUILT)]:
        host(gpu, build)
        assert takes_kernel(implementation=implementation, dtype=dtype)


REFUSALS = {
    "not built": (Gpu(), NOT_BUILT, jnp.bfloat16, r"the kernels are not built \(no nvcc\)"),
    "A100": (A100, BUILT, jnp.bfloat16, r"A100 has compute capability 8.0, the kernel needs 9.0"),
    "float32": (Gpu(), BUILT, jnp.float32, "float32 has no kernel, bfloat16 and float16 have"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_portable_on_cuda_warns_with_the_reason(host: Callable, name: str) -> None:
    gpu, build, dtype, reason = REFUSALS[name]
    host(gpu, build)
    with pytest.warns(UserWarning, match=f"slow portable path: .*{reason}"):
        assert not takes_kernel(dtype=dtype)


def test_the_warning_comes_once(host: Callable) -> None:
    host(A100, BUILT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        takes_kernel()
        takes_kernel(dtype=jnp.float16)
    assert len(caught) == 1


@pytest.mark.parametrize("name", REFUSALS)
def test_asking_for_the_kernel_where_it_cannot_run_is_an_error(host: Callable, name: str) -> None:
    gpu, build, dtype, reason = REFUSALS[name]
    host(gpu, build)
    with pytest.raises((RuntimeError, ValueError), match=f"got 'cuda', which cannot run.*{reason}"):
        takes_kernel(implementation="cuda", dtype=dtype)


@pytest.mark.usefixtures("host")
def test_asking_for_the_kernel_on_a_cpu_is_an_error() -> None:
    arrays = [jnp.zeros(x.shape, x.dtype) for x in split_arrays()]
    with pytest.raises(RuntimeError, match="got 'cuda', which cannot run here: the kernel needs"):
        decode(*arrays, implementation="cuda")


def test_asking_for_xla_never_calls_the_kernels(host: Callable) -> None:
    host(Gpu(), BUILT)
    text = lowered(functools.partial(decode, implementation="xla"), *split_arrays())
    assert not custom_calls(text)


def test_default_parts_come_from_the_gpu_at_trace_time(host: Callable) -> None:
    host(Gpu(core_count=78), BUILT)
    metadata = functools.partial(jax_flashmla.get_mla_metadata, np.zeros(2, np.int32))
    assert jax.eval_shape(lambda: metadata(64, 1))[0].shape == (78, 8)
    assert jax.eval_shape(lambda: metadata(65, 3))[0].shape == (13, 8)


def test_status_on_a_cpu(host: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    host(None, BUILT)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    status = jax_flashmla.status()
    assert (status.version, status.cuda) == (jax_flashmla.__version__, "13.0")
    assert (status.path, status.reason[:21]) == ("portable", "the kernel needs CUDA")


@pytest.mark.parametrize(
    ("gpu", "build", "path", "reason"),
    [
        (Gpu(), BUILT, "kernel", "the kernel is built for this GPU"),
        (Gpu(), NOT_BUILT, "portable", "the kernels are not built (no nvcc)"),
        (A100, BUILT, "portable", "A100 has compute capability 8.0"),
    ],
    ids=["Hopper", "not built", "A100"],
)
def test_status_on_a_gpu(
    host: Callable,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu,
    build: _ffi.Build,
    path: str,
    reason: str,
) -> None:
    host(gpu, build)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    status = jax_flashmla.status()
    assert (status.cuda, status.path) == (build.cuda_version, path)
    assert reason in status.reason
    for part in (status.version, gpu.device_kind, path, status.reason):
        assert part in str(status)
