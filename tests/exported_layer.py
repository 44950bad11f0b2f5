"""A program that decodes with two layers, and the file that keeps it as it was once exported.

    python tests/exported_layer.py        writes tests/data/layer.jaxexport anew

As in `exported_step`, the file was made by the oldest supported JAX and is to stay.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import place, random_weights
from jax import export

from jax_flashmla import exporting, mla

PATH = Path(__file__).parent / "data" / "layer.jaxexport"
PLATFORMS = ("cpu", "cuda")
PAGES, TABLE, QUERIES = 16, 4, 2
DIMS = {"hidden_size": 64, "num_attention_heads": 2, "qk_nope_head_dim": 128, "v_head_dim": 16}
LOW_RANK = mla.MLAConfig(**DIMS, q_lora_rank=64)
PLAIN = mla.MLAConfig(**DIMS, rope_interleave=False)

Results = tuple[jax.Array, ...]


def step(
    low_rank: dict[str, jax.Array],
    plain: dict[str, jax.Array],
    x: jax.Array,
    pools: tuple[jax.Array, jax.Array],
    *tables: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Results]:
    """Decodes with a layer of a low rank and one without; projects queries besides."""
    weights, others = _of(low_rank), _of(plain)
    made = mla.decode_step(LOW_RANK, *tables)
    y, first = mla.decode(weights, LOW_RANK, x, pools[0], made)
    x += y
    y, second = mla.decode(others, PLAIN, x, pools[1], mla.decode_step(PLAIN, *tables))
    x += y
    queries = mla.absorbed_queries(x, others.query_up, others.key_up, made.cos, made.sin)
    return x, (first, second), queries


def _of(arrays: dict[str, jax.Array]) -> mla.MLAWeights:
    return mla.MLAWeights(**{name: arrays.get(name) for name in mla.MLAWeights._fields})


def _arrays(config: mla.MLAConfig) -> dict[str, jax.Array]:
    """A dictionary, which JAX serialises without being told how."""
    named = random_weights(config, "bfloat16")._asdict()
    return {name: x for name, x in named.items() if x is not None}


def shapes(batch: object) -> tuple:
    """Descriptions of the arguments, for a batch that may be symbolic."""

    def of(*shape: object, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    weights = (jax.eval_shape(lambda c=c: _arrays(c)) for c in (LOW_RANK, PLAIN))
    tables = (batch, TABLE), (batch,), (batch, QUERIES)
    return (
        *weights,
        of(batch, QUERIES, DIMS["hidden_size"]),
        (of(PAGES, 64, 1, 576),) * 2,
        *(of(*shape, dtype="int32") for shape in tables),
    )


def arguments(batch: int) -> tuple:
    """Values of the arguments: ragged requests, of which every fourth is empty."""
    rng = np.random.default_rng(batch)
    lengths = np.resize([70, 200, 1, 0], batch).tolist()
    table, *rest = place(lengths, QUERIES, PAGES)
    table = jnp.pad(table, ((0, 0), (0, TABLE - table.shape[1])), constant_values=-1)
    x, *pools = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((batch, QUERIES, DIMS["hidden_size"]), *[(PAGES, 64, 1, 576)] * 2)
    )
    return _arrays(LOW_RANK), _arrays(PLAIN), x, tuple(pools), table, *rest


def exported() -> export.Exported:
    """The program, for both platforms and any batch."""
    (batch,) = export.symbolic_shape("b", constraints=[exporting.MAX_SYMBOLIC_BATCH])
    checks = exporting.disabled_checks()
    made = export.export(jax.jit(step), platforms=PLATFORMS, disabled_checks=checks)
    return made(*shapes(batch))


if __name__ == "__main__":
    PATH.write_bytes(exported().serialize())
