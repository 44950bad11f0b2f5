import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jax_flashmla import _demo
from jax_flashmla.__main__ import main

SMALL = ["--moments", "2", "--layers", "2", "--heads", "3"]


@pytest.fixture
def trace_file(tmp_path: pathlib.Path) -> str:
    lengths = (1, 70, 700)
    lines = (
        {"timestamp": 0, "input_length": length, "output_length": 8, "hash_ids": [1]}
        for length in lengths
    )
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_runs_and_passes_its_check(
    trace_file: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", trace_file, "--dtype", dtype, *SMALL]) == 0
    printed = capsys.readouterr()
    assert "portable" in printed.out or "kernel" in printed.out
    assert f"2 layers in one jit, schedule included; 3 heads, {dtype}" in printed.out
    assert "FAILED" not in printed.out
    assert "[2/2] 3 requests" in printed.err


def test_says_that_no_floor_applies(trace_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    if jax.local_devices()[0].platform != "cpu":
        pytest.skip("a floor may apply")
    main(["--trace", trace_file, *SMALL])
    assert "none applies on cpu" in capsys.readouterr().out


def test_sample_runs_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--moments", "1", "--layers", "1", "--heads", "1"]) == 0
    assert "built-in sample" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", ["out 5% too large", "pages of the first layer"])
def test_a_wrong_last_layer_fails(
    trace_file: str,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right, tables = _demo.mla_decode, []

    def wrong(
        q_latent: jax.Array,
        q_rope: jax.Array,
        kv_cache: jax.Array,
        table: jax.Array,
        lengths: jax.Array,
        **options: object,
    ) -> tuple[jax.Array, jax.Array]:
        tables.append(table)
        if mistake == "pages of the first layer":
            return right(q_latent, q_rope, kv_cache, tables[0], lengths, **options)
        out, lse = right(q_latent, q_rope, kv_cache, table, lengths, **options)
        return out * jnp.asarray(1.05, out.dtype), lse

    monkeypatch.setattr(_demo, "mla_decode", wrong)
    assert main(["--trace", trace_file, *SMALL]) == 1
    assert "FAILED" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--moments", "0"], "--moments: expected a whole number of at least 1, got '0'"),
        (["--layers", "x"], "--layers: expected a whole number of at least 1, got 'x'"),
        (["--heads", "-3"], "--heads: expected"),
        (["--tpot-ms", "nan"], "--tpot-ms: expected a number above 0, got 'nan'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--trace", "/nowhere/t.jsonl"], "cannot read /nowhere/t.jsonl: No such file"),
        (["--trace", "/"], "cannot read /: Is a directory"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, arguments)


def test_bad_line_is_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0}\n', encoding="utf-8")
    assert f"{path}:1: field 'input_length' is missing" in refused(capsys, ["--trace", str(path)])


@pytest.mark.parametrize(("fits", "code"), [(0, 2), (1, 0)])
def test_layers_are_limited_by_memory(
    trace_file: str,
    fits: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_demo, "layers_that_fit", lambda *_: fits)
    assert main(["--trace", trace_file, *SMALL]) == code
    printed = capsys.readouterr()
    expected = "note    1 of 2 layers fit into memory" if fits else "does not fit into memory"
    assert expected in printed.out + printed.err
