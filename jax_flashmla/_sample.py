"""A small made-up trace, for a first run without a file."""

import random

from jax_flashmla.trace import HASH_BLOCK_PAGES, PAGE_SIZE, Request

_BLOCK = HASH_BLOCK_PAGES * PAGE_SIZE
_DOCUMENT_BLOCKS = (1, 2, 5, 8)  # shared openings: short and long system prompts, two documents
_SESSIONS = 40
_SPAN_MS = 90_000


def sample_trace() -> tuple[Request, ...]:
    """About 90 requests of 40 conversations that open with one of four shared texts.

    A later turn's prompt is the conversation so far. Lengths are log-normal, as in production
    traces, with medians small enough for a CPU. Every call gives the same requests.
    """
    rng = random.Random(2026)
    turns = [turn for session in range(_SESSIONS) for turn in _session(rng, session)]
    turns.sort(key=lambda turn: turn[0])
    ids: dict[tuple[object, ...], int] = {}
    return tuple(
        Request(timestamp, prompt, output, tuple(ids.setdefault(key, len(ids)) for key in keys))
        for timestamp, prompt, output, keys in turns
    )


def _session(
    rng: random.Random, session: int
) -> list[tuple[int, int, int, list[tuple[object, ...]]]]:
    """(timestamp, input_length, output_length, names of the prompt's blocks) of each turn."""
    document = rng.randrange(len(_DOCUMENT_BLOCKS))
    opening = _DOCUMENT_BLOCKS[document]
    time = rng.uniform(0, _SPAN_MS)
    length = opening * _BLOCK
    turns = []
    for turn in range(rng.randint(1, 4)):
        length += min(4000, int(rng.lognormvariate(5.8, 0.9)))
        output = min(800, 20 + int(rng.lognormvariate(5.0, 0.7)))
        keys: list[tuple[object, ...]] = []
        for block in range(-(-length // _BLOCK)):
            if block < opening:
                keys.append(("document", document, block))
            elif (block + 1) * _BLOCK <= length:
                keys.append(("session", session, block))
            else:
                keys.append(("session", session, block, turn))
        turns.append((int(time), length, output, keys))
        length += output
        time += output * 50 + rng.expovariate(1 / 8000)
    return turns
