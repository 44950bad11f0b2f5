import json
import pathlib

import numpy as np
import pytest

from jax_flashmla import trace
from jax_flashmla._sample import sample_trace
from jax_flashmla.trace import Request

GOOD = {"timestamp": 10, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}


def write(path: pathlib.Path, *lines: object) -> pathlib.Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def at(requests: tuple[Request, ...], time: float, tpot_ms: float = 50.0) -> trace.Moment:
    return trace.moment_at(requests, time, tpot_ms=tpot_ms, rng=np.random.default_rng(0))


def test_reads_requests_sorted_by_arrival(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "t", {**GOOD, "timestamp": 20.5}, "", GOOD)
    assert trace.read_trace(path) == (Request(10, 600, 5, (1, 2)), Request(20.5, 600, 5, (1, 2)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"t:2: not JSON"),
        ("[1]", r"t:2: expected a JSON object, got list"),
        ({"timestamp": 1}, r"t:2: field 'input_length' is missing"),
        ({**GOOD, "timestamp": "now"}, r"t:2: 'timestamp' must be a number .* got 'now'"),
        ({**GOOD, "timestamp": -1}, r"t:2: 'timestamp' must be a number in \[0, 2\*\*31\), got -1"),
        ({**GOOD, "timestamp": float("nan")}, r"t:2: 'timestamp' must be a number .* got nan"),
        ({**GOOD, "input_length": 0}, r"t:2: 'input_length' must be an integer in \[1, .* got 0"),
        ({**GOOD, "input_length": 1.5}, r"t:2: 'input_length' must be an integer .* got 1.5"),
        ({**GOOD, "output_length": True}, r"t:2: 'output_length' must be an integer .* got True"),
        ({**GOOD, "output_length": 2**31}, r"t:2: 'output_length' must be an integer"),
        ({**GOOD, "hash_ids": 3}, r"t:2: 'hash_ids' must be a list of integers, got 3"),
        ({**GOOD, "hash_ids": [1, "2"]}, r"t:2: 'hash_ids' must be a list of integers, got"),
    ],
)
def test_names_file_line_and_field(tmp_path: pathlib.Path, line: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace.read_trace(write(tmp_path / "t", GOOD, line))


def test_rejects_an_empty_trace(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no requests"):
        trace.read_trace(write(tmp_path / "t", "", " "))


def test_rejects_a_binary_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        trace.read_trace(tmp_path / "t")


def test_request_is_in_flight_for_its_output() -> None:
    requests = (Request(100, 64, 4, ()),)
    lengths = [at(requests, time).cache_seqlens.tolist() for time in (99, 100, 149, 150, 299, 300)]
    assert lengths == [[], [65], [65], [66], [68], []]


def test_equal_prefixes_share_pages_and_nothing_else_does() -> None:
    # 10 full prompt pages each; one block of 8 pages in common, then different ids.
    requests = (Request(0, 640, 9, (7, 8)), Request(0, 640, 9, (7, 9)))
    moment = at(requests, 0)
    table = moment.block_table
    assert table.shape == (2, 11)
    np.testing.assert_array_equal(table[0, :8], table[1, :8])
    assert len(set(table.ravel())) == moment.num_pages == 8 + 2 * 3
    assert (moment.tokens, moment.unique_tokens) == (1282, 1282 - 8 * 64)


def test_page_with_generated_tokens_is_private() -> None:
    # Same single block, but the last prompt page of each is only partly prompt.
    moment = at((Request(0, 100, 9, (7,)), Request(0, 100, 9, (7,))), 0)
    first, second = moment.block_table
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_prompt_pages_without_an_id_are_private() -> None:
    moment = at((Request(0, 1024, 9, (7,)), Request(0, 1024, 9, (7,))), 0)
    assert moment.num_pages == 8 + 2 * 9


def test_pages_are_dense_and_entries_behind_the_end_are_not() -> None:
    moment = at((Request(0, 63, 9, ()), Request(0, 300, 9, ())), 0)
    assert sorted(moment.block_table[moment.block_table >= 0]) == list(range(moment.num_pages))
    np.testing.assert_array_equal(moment.block_table[0, 1:], -1)


def test_padding_adds_empty_requests() -> None:
    moment = at((Request(0, 70, 9, ()),), 0)
    padded = moment.padded(3, 4)
    assert padded.cache_seqlens.tolist() == [71, 0, 0]
    assert padded.block_table.shape == (3, 4)
    assert (padded.tokens, padded.unique_tokens) == (moment.tokens, moment.unique_tokens)


def test_every_moment_has_requests_in_flight() -> None:
    requests = tuple(Request(10_000 * i, 100, i % 2, ()) for i in range(50))
    moments = trace.take_moments(requests, 10, tpot_ms=1.0)
    assert [len(moment.cache_seqlens) for moment in moments] == [1] * 10
    assert len({moment.time for moment in moments}) == 10


def test_rejects_a_trace_that_generates_nothing() -> None:
    with pytest.raises(ValueError, match="output_length above 0"):
        trace.take_moments((Request(0, 100, 0, ()),), 1, tpot_ms=50.0)


def test_moments_are_reproducible() -> None:
    first, second = (trace.take_moments(sample_trace(), 3, tpot_ms=50.0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.block_table, b.block_table)


def test_sample_shares_prefixes_and_stays_small() -> None:
    moments = trace.take_moments(sample_trace(), 10, tpot_ms=50.0)
    assert sum(moment.unique_tokens for moment in moments) < sum(m.tokens for m in moments)
    assert max(moment.tokens for moment in moments) < 100_000
    for request in sample_trace():
        assert len(request.hash_ids) == -(-request.input_length // 512)
