"""The MLA layer as Flax NNX modules; needs the extra `flax`.

Only the cache of a serving step is donated, so the model is split by variable type::

    graphdef, cache, rest = nnx.split(model, PagedLatentCache, ...)

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, rest, *inputs):
        model = nnx.merge(graphdef, cache, rest)
        y = model(*inputs)
        return y, nnx.state(model, PagedLatentCache)

    y, cache = step(cache, rest, *inputs)

`jax.jit` on a module drops its writes, and `nnx.jit(donate_argnums=0)` donates the parameters too.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_flashmla import cache as paged
from jax_flashmla._dispatch import Implementation
from jax_flashmla.mla.config import MLAConfig
from jax_flashmla.mla.layer import decode
from jax_flashmla.mla.prefill import prefill
from jax_flashmla.mla.step import Step
from jax_flashmla.mla.weights import MLAWeights


class PagedLatentCache(nnx.Cache):
    """The flat page pool of a model's layers, `[num_layers * num_pages, 64, 1, 576]`.

    One variable for the whole model, owned by it and passed to its layers.
    """


def make_cache(
    num_layers: int, num_pages: int, *, dtype: DTypeLike = jnp.bfloat16
) -> PagedLatentCache:
    """Makes the cache of a model; the arguments are those of `jax_flashmla.cache.make_pool`."""
    return PagedLatentCache(paged.make_pool(num_layers, num_pages, dtype=dtype))


class MLAAttention(nnx.Module):
    """The attention of one layer; the arithmetic is that of `mla.decode` and `mla.prefill`.

    The parameters are the fields of `MLAWeights`, by name.

    Attributes:
        config: of the model.
    """

    def __init__(self, config: MLAConfig, weights: MLAWeights) -> None:
        """Wraps loaded weights as parameters."""
        self.config = config
        for name, array in weights._asdict().items():
            setattr(self, name, None if array is None else nnx.Param(array))

    @property
    def weights(self) -> MLAWeights:
        """The parameters as `mla.decode` takes them."""
        given = {name: getattr(self, name) for name in MLAWeights._fields}
        return MLAWeights(**{k: None if v is None else v[...] for k, v in given.items()})

    def decode(
        self,
        x: jax.Array,
        cache: PagedLatentCache,
        step: Step,
        *,
        implementation: Implementation = None,
    ) -> jax.Array:
        """Runs the newest s_q tokens of each request and writes them into the cache.

        Args:
            x: normalised hidden states `[b, s_q, hidden]`.
            cache: of the model; it is updated.
            step: from `mla.decode_step`, for this layer `step.at_layer(layer, num_pages)`.
            implementation: as in `mla.decode`.

        Returns:
            `[b, s_q, hidden]` to add to the residual stream.
        """
        y, cache[...] = decode(
            self.weights, self.config, x, cache[...], step, implementation=implementation
        )
        return y

    def prefill(
        self,
        x: jax.Array,
        cache: PagedLatentCache,
        step: Step,
        *,
        implementation: Implementation = None,
    ) -> jax.Array:
        """Runs up to s_q new tokens of each request behind what is cached, and writes them.

        Arguments and result are those of `decode`, the step comes from `mla.prefill_step`.
        """
        y, cache[...] = prefill(
            self.weights, self.config, x, cache[...], step, implementation=implementation
        )
        return y
