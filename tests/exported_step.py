"""A program that holds all targets, and the file that keeps it as it was once exported.

    python tests/exported_step.py        writes tests/data/step.jaxexport anew

The file was made by the oldest supported JAX. It is to be made anew only when the stable interface
of the targets has changed on purpose, which breaks the exported programs of users too.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import jax_flashmla
from jax_flashmla import cache, exporting

PATH = Path(__file__).parent / "data" / "step.jaxexport"
PLATFORMS = ("cpu", "cuda")
HEADS, PAGES, WIDTH, SCALE = 16, 12, 3, 0.1
Arrays = tuple[jax.Array, ...]


def step(
    q_latent: jax.Array,
    q_rope: jax.Array,
    pool: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    new: Arrays,
) -> dict[str, jax.Array]:
    """Appends a token to each request, decodes, gathers, and merges with a second decode.

    Args:
        q_latent: `[b, 1, HEADS, 512]`.
        q_rope: `[b, 1, HEADS, 64]`.
        pool: `[PAGES, 64, 1, 576]`.
        table: int32 `[b, WIDTH]`.
        lengths: int32 `[b]`, with the new token.
        new: latent `[b, 512]`, rope `[b, 64]`, slots int32 `[b]`, cos and sin `[b, 32]`.
    """
    latent, rope, slots, cos, sin = new
    pool = cache.append(pool, latent, rope, slots, cos=cos, sin=sin)
    schedule = jax_flashmla.get_mla_metadata(lengths, HEADS, 1, num_sm_parts=132)
    arrays = q_latent, q_rope, pool, table
    out, lse = jax_flashmla.mla_decode(*arrays, lengths, softmax_scale=SCALE, schedule=schedule)
    first = jax_flashmla.mla_decode(
        *arrays, jnp.minimum(lengths, 64), softmax_scale=SCALE, num_sm_parts=132
    )
    outs, lses = (jnp.stack(pair) for pair in zip((out, lse), first, strict=True))
    merged, _ = jax_flashmla.merge_partials(outs, lses)
    tokens = cache.gather(pool, table, lengths)
    return {"out": out, "lse": lse, "merged": merged, "tokens": tokens, "pool": pool}


def shapes(batch: object) -> tuple:
    """Descriptions of the arguments, for a batch that may be symbolic."""
    half, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    new = ((batch, 512), half), ((batch, 64), half), ((batch,), i32), *[((batch, 32), f32)] * 2
    plain = (
        ((batch, 1, HEADS, 512), half),
        ((batch, 1, HEADS, 64), half),
        ((PAGES, 64, 1, 576), half),
        ((batch, WIDTH), i32),
        ((batch,), i32),
    )
    described = [jax.ShapeDtypeStruct(*x) for x in (*plain, *new)]
    return (*described[:5], tuple(described[5:]))


def arguments(batch: int) -> tuple:
    """Values of the arguments."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(1, WIDTH * 64 + 1, batch).astype(np.int32)
    table = rng.permutation(PAGES)[: batch * WIDTH].reshape(batch, WIDTH).astype(np.int32)
    last = lengths - 1
    slots = table[np.arange(batch), last // 64] * 64 + last % 64
    values = [
        jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in jax.tree.leaves(shapes(batch))
    ]
    values[3], values[4], values[7] = (jnp.asarray(x) for x in (table, lengths, slots))
    return (*values[:5], tuple(values[5:]))


def exported() -> export.Exported:
    """Exports the step for any batch and both platforms."""
    (batch,) = export.symbolic_shape("b", constraints=[exporting.MAX_SYMBOLIC_BATCH])
    checks = exporting.disabled_checks()
    export_step = export.export(jax.jit(step), platforms=PLATFORMS, disabled_checks=checks)
    return export_step(*shapes(batch))


if __name__ == "__main__":
    PATH.write_bytes(exported().serialize())
    print(f"{PATH}: {PATH.stat().st_size} bytes, JAX {jax.__version__}")
