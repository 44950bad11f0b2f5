"""The benchmark of whole attention stacks: its rows fit, share what they must, and it runs."""

import pathlib
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_script import run_quick

from jax_flashmla import mla
from jax_flashmla._roofline import H200


@pytest.fixture
def stack(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("stack")


def test_rows_fit_the_card_and_share_no_more_than_they_must(stack: ModuleType) -> None:
    rows = stack.load_rows()
    sharing = {row.name: row.sharers for row in rows if row.sharers > 1}
    assert len(rows) == 12
    assert sharing == {"v3/128x32768": 4, "v2lite/128x32768": 2}
    for row in rows:
        pool = row.model.layers * row.num_pages * 64 * 576 * 2
        assert pool + row.weight_floor_seconds(H200) * H200.bytes_per_s < 115e9


def test_floors_are_bytes_over_bandwidth(stack: ModuleType) -> None:
    row = stack.load_rows("v3/128x4096")[0]
    # 7168 x 2112 + 1536 x 24576 + 2 x 128 x 128 x 512 + 16384 x 7168, and the norms
    numbers = 15138816 + 37748736 + 2 * 8388608 + 117440512 + 7168 + 1536 + 512
    assert row.weight_floor_seconds(H200) == pytest.approx(61 * numbers * 2 / 4.65e12)
    assert row.floor_seconds(H200) == pytest.approx(61 * (185.6e-6 + 80.5e-6), rel=1e-3)


@pytest.mark.parametrize("name", ["v3/128x32768", "v2lite/32x4096"])
def test_new_tokens_have_slots_of_their_own(stack: ModuleType, name: str) -> None:
    row = stack.load_rows(name)[0]
    table, lengths, slots = stack.tables(row)
    assert table.shape == (row.batch, row.seqlen // 64)
    assert table.max() < row.num_pages
    assert len(set(slots.ravel())) == row.batch
    assert (slots.ravel() // 64 == table[:, -1]).all()
    assert (lengths == row.seqlen).all()
    assert len(np.unique(table)) * 64 >= row.work.unique_tokens


def test_loop_scan_and_gather_agree(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contenders compute the same step; the gather's scale is its own, so it is set here."""
    stack, contenders = load("stack"), load("contenders")
    row = stack.load_rows("v3/128x4096")[0].shrunk()
    config, model = row.model.config, row.model
    monkeypatch.setattr(contenders, "SOFTMAX_SCALE", config.softmax_scale)
    layers, pool = stack.random_layers(model), stack.make_pool(row)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    rest = tuple(map(jnp.asarray, stack.tables(row)))
    x = jax.random.normal(jax.random.key(0), (row.batch, 1, config.hidden_size), jnp.bfloat16)
    with jax.numpy_rank_promotion("allow"):  # the gather is no code of the library
        runs = [
            jax.jit(stack.unrolled(mla.decode, model))(x, pool, layers, *rest),
            jax.jit(stack.scanned(mla.decode, model))(x, pool, stacked, *rest),
            jax.jit(stack.unrolled(stack.gather_attention, model))(x, pool, layers, *rest),
        ]
    first, *others = (np.asarray(y, np.float32) for y, _ in runs)
    for other in others:
        assert np.abs(other - first).max() < 0.05  # bfloat16, of unit size


def test_script_runs_on_tiny_shapes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "result.json"
    option = "xla_gpu_graph_min_graph_size=4"
    options = "--profile", "--compiler-option", option
    result = run_quick("layer_stack.py", out, "--rows", "v2lite/128x*", *options)
    (row,) = result["rows"]  # both shrink to the same
    assert all(row[name] > 0 for name in ("us", "kernels_us", "xla_us"))
    assert row["layer_kernels"] == []  # no GPU
    assert result["compiler_options"] == dict([option.split("=")])
    assert (row["model"], row["shared_pages"]) == ("v2lite", False)


def test_profile_counts_what_each_kernel_adds(load: Callable[[str], ModuleType]) -> None:
    profile = load("layer_profile")
    # A combine that starts while the decode kernel runs, a gap, a product; a step's end differs.
    layer = [("decode_kernel", 0, 100), ("combine_kernel", 20, 110), ("gemm_fusion_dot", 115, 145)]
    events = [
        profile.Event(name, at + start, at + end)
        for at in (0, 200, 400, 700)
        for name, start, end in layer[: 1 if at == 400 else 3]
    ]
    assert profile.layer_kernels(events) == [
        {"kernel": "decode_kernel", "us": 0.1},
        {"kernel": "combine_kernel", "us": 0.01},
        {"kernel": "gemm_fusion_dot", "us": 0.03},
    ]
    assert profile.layer_kernels([]) == []


def test_layer_table_sums_kernels_by_kind(load: Callable[[str], ModuleType]) -> None:
    names = "decode_few_kernel", "combine_kernel", "queries_kernel", "gemm_fusion_dot", "fusion"
    entry = {
        "model": "v3",
        "layers": 2,
        "batch": 1,
        "seqlen": 64,
        "us": 70.0,
        "attention_floor_us": 4.0,
        "weight_floor_us": 8.0,
        "layer_kernels": [{"kernel": name, "us": 2.0**i} for i, name in enumerate(names)],
    }
    *_, row = load("layer_stack").layer_table([entry]).splitlines()
    assert row == "| v3, 1 × 64 | 35.0 | 3.0 | 2.0 | 12.0 | 4.0 | 16.0 |"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void flashmla::decode::decode_kernel<__nv_bfloat16, false>(A)", "decode_kernel"),
        ("void flashmla::cache::(anonymous namespace)::append_kernel<half>(B)", "append_kernel"),
        ("gemm_fusion_dot_108", "gemm_fusion_dot"),
        ("nvjet_sm90_tst_64x32_64x16_1x2_h_bz_NTT", "nvjet_sm90_tst_64x32_64x16_1x2_h_bz_NTT"),
    ],
)
def test_profile_shortens_names(load: Callable[[str], ModuleType], name: str, short: str) -> None:
    assert load("layer_profile").short_name(name) == short
