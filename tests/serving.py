"""Serves given tokens through the dense stack with a page allocator: teacher-forced logits."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import dense_stack
import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import cache, mla
from jax_flashmla.pages import PagePool, Writes

Change = Callable[[mla.Step], mla.Step]


@dataclasses.dataclass
class Server:
    """Requests in flight.

    Attributes:
        weights: of the model.
        config: of its attention.
        pages: the allocator of one layer's pages.
        num_pages: how many these are.
        batch: rows of a decode batch, padded to this.
        change: what is done to each step before it runs, for controls that have to fail.
        options: of the layer.
    """

    weights: dense_stack.Weights
    config: mla.MLAConfig
    num_pages: int = 24
    max_pages_per_seq: int = 6
    batch: int = 5
    change: Change = lambda step: step
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Starts without requests, the pool full of NaN: only what was written may be read."""
        self.pages = PagePool(self.num_pages, max_pages_per_seq=self.max_pages_per_seq)
        dtype = self.weights.embedding.dtype
        self.pool = cache.make_pool(self.weights.num_layers, self.num_pages, dtype=dtype) + jnp.nan
        run = functools.partial(dense_stack.forward, **self.options)
        self._decode = jax.jit(
            functools.partial(run, mla.decode), static_argnums=1, donate_argnums=3
        )
        self._prefill = jax.jit(
            functools.partial(run, mla.prefill), static_argnums=1, donate_argnums=3
        )

    def prefill(self, tokens: Mapping[Hashable, np.ndarray]) -> dict[Hashable, np.ndarray]:
        """Appends tokens to requests, ragged; returns each one's logits `[tokens, vocabulary]`."""
        for name in tokens:
            if name not in self.pages.requests:
                self.pages.add(name)
        counts = {name: len(ids) for name, ids in tokens.items()}
        writes = self._append(counts)
        lengths = np.array(list(counts.values()), np.int32)
        rows = self.pages.rows(list(tokens))
        step = mla.prefill_step(
            self.config, rows.block_table, rows.cache_seqlens, lengths, writes.slots
        )
        return self._run(self._prefill, tokens, step, writes.slots.shape)

    def decode(self, tokens: Mapping[Hashable, np.ndarray]) -> dict[Hashable, np.ndarray]:
        """Appends the same number of tokens to each request, s_q, in a padded batch."""
        writes = self._append({name: len(ids) for name, ids in tokens.items()}, self.batch)
        rows = self.pages.rows(list(tokens), batch=self.batch)
        step = mla.decode_step(self.config, rows.block_table, rows.cache_seqlens, writes.slots)
        return self._run(self._decode, tokens, step, writes.slots.shape)

    def _append(self, counts: Mapping[Hashable, int], batch: int | None = None) -> Writes:
        writes = self.pages.append(counts, batch=batch)
        if (writes.copies >= 0).any():
            self.pool = cache.copy_pages(self.pool, writes.copies, num_pages=self.num_pages)
        return writes

    def _run(
        self,
        forward: Callable,
        tokens: Mapping[Hashable, np.ndarray],
        step: mla.Step,
        shape: tuple[int, int],
    ) -> dict[Hashable, np.ndarray]:
        padded = np.zeros(shape, np.int32)
        for row, ids in enumerate(tokens.values()):
            padded[row, : len(ids)] = ids
        logits, self.pool = forward(
            self.weights, self.config, jnp.asarray(padded), self.pool, self.change(step)
        )
        logits = np.asarray(logits.astype(jnp.float32))
        return {name: logits[row, : len(ids)] for row, (name, ids) in enumerate(tokens.items())}
