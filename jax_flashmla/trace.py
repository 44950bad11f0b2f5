"""Batches with prefix-shared pages, taken from a trace of served requests.

A trace is JSON lines, one request a line, in the format of the Mooncake release (FAST'25):
``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens), ``hash_ids`` (one id per block
of 512 prompt tokens; an id stands for the whole prefix up to its block's end, so equal ids mean
equal keys).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

PAGE_SIZE = 64
HASH_BLOCK_PAGES = 8  # 512 tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of a trace.

    Attributes:
        timestamp: Arrival, ms.
        input_length: Prompt tokens.
        output_length: Tokens that will be generated.
        hash_ids: One id per block of 512 prompt tokens, the last block may be partly filled.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Moment:
    """The requests in flight at one time, as one decode batch.

    Attributes:
        time: ms since the trace's zero.
        cache_seqlens: int32 [b], tokens in the cache, the newest one included.
        block_table: int32 [b, max_pages_per_seq], physical pages 0..num_pages-1, -1 behind the end.
        num_pages: Distinct physical pages.
    """

    time: float
    cache_seqlens: np.ndarray
    block_table: np.ndarray
    num_pages: int

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens attended to; a shared page counts once per request."""
        return int(self.cache_seqlens.sum(dtype=np.int64))

    @functools.cached_property
    def unique_tokens(self) -> int:
        """Tokens attended to; a shared page counts once. Only full pages are ever shared."""
        references = int(np.count_nonzero(self.block_table >= 0))
        return self.tokens - PAGE_SIZE * (references - self.num_pages)

    def padded(self, batch: int, width: int) -> "Moment":
        """The same moment with empty requests and table columns added, [batch, width]."""
        rows, columns = self.block_table.shape
        return dataclasses.replace(
            self,
            cache_seqlens=np.pad(self.cache_seqlens, (0, batch - rows)),
            block_table=np.pad(
                self.block_table, ((0, batch - rows), (0, width - columns)), constant_values=-1
            ),
        )


def read_trace(path: str | pathlib.Path) -> tuple[Request, ...]:
    """Reads a trace, sorted by arrival.

    Args:
        path: A JSON-lines file; blank lines are skipped.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is malformed (the message names file, line and field), or none is there.
    """
    requests = []
    with pathlib.Path(path).open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    requests.append(_request(line, f"{path}:{number}"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a UTF-8 text file ({error})") from None
    if not requests:
        raise ValueError(f"{path}: the trace holds no requests")
    return tuple(sorted(requests, key=lambda request: request.timestamp))


def _request(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    return Request(
        timestamp=_number(fields, "timestamp", where, low=0, integral=False),
        input_length=int(_number(fields, "input_length", where, low=1)),
        output_length=int(_number(fields, "output_length", where, low=0)),
        hash_ids=_hash_ids(fields, where),
    )


def _number(
    fields: dict[str, object], name: str, where: str, *, low: int, integral: bool = True
) -> float:
    value = _field(fields, name, where)
    kinds = int if integral else (int, float)
    in_range = isinstance(value, kinds) and low <= value < 2**31
    if isinstance(value, bool) or not in_range:
        kind = "an integer" if integral else "a number"
        raise ValueError(f"{where}: '{name}' must be {kind} in [{low}, 2**31), got {value!r:.80}")
    return value


def _hash_ids(fields: dict[str, object], where: str) -> tuple[int, ...]:
    ids = _field(fields, "hash_ids", where)
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"{where}: 'hash_ids' must be a list of integers, got {ids!r:.80}")
    return tuple(ids)


def _field(fields: dict[str, object], name: str, where: str) -> object:
    if name not in fields:
        raise ValueError(f"{where}: field '{name}' is missing")
    return fields[name]


def take_moments(
    requests: Sequence[Request], count: int, *, tpot_ms: float, seed: int = 0
) -> tuple[Moment, ...]:
    """Batches at ``count`` times, spread evenly over the arrivals.

    A request is in flight from its timestamp for ``output_length * tpot_ms``.

    Args:
        requests: The trace, sorted by arrival.
        count: How many moments.
        tpot_ms: Time per output token, ms.
        seed: Of the physical page order.

    Raises:
        ValueError: No request of the trace generates a token.
    """
    decoding = [request for request in requests if request.output_length > 0]
    if not decoding:
        raise ValueError("no request of the trace has an output_length above 0")
    times = [decoding[(2 * i + 1) * len(decoding) // (2 * count)].timestamp for i in range(count)]
    rng = np.random.default_rng(seed)
    return tuple(moment_at(decoding, time, tpot_ms=tpot_ms, rng=rng) for time in times)


def moment_at(
    requests: Sequence[Request], time: float, *, tpot_ms: float, rng: np.random.Generator
) -> Moment:
    """The batch of all requests in flight at ``time``; equal prefixes get the same pages.

    A page is shared when it lies inside the prompts: pages that hold generated tokens are private.
    """
    flying = [r for r in requests if 0 <= time - r.timestamp < r.output_length * tpot_ms]
    lengths = [r.input_length + 1 + int((time - r.timestamp) // tpot_ms) for r in flying]
    widths = [-(-length // PAGE_SIZE) for length in lengths]
    table = np.full((len(flying), max(widths, default=0)), -1, np.int32)
    page_of: dict[object, int] = {}
    for row, (request, width) in enumerate(zip(flying, widths, strict=True)):
        shareable = request.input_length // PAGE_SIZE
        for page in range(width):
            block = page // HASH_BLOCK_PAGES
            if page < shareable and block < len(request.hash_ids):
                key: object = ("prefix", request.hash_ids[block], page)
            else:
                key = ("private", row, page)
            table[row, page] = page_of.setdefault(key, len(page_of))
    order = rng.permutation(len(page_of)).astype(np.int32)
    shuffled = np.where(table >= 0, order[table], np.int32(-1)) if page_of else table
    return Moment(time, np.asarray(lengths, np.int32), shuffled, len(page_of))
