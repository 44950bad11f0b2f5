"""A program that appends projected rows, and the file that keeps it as it was once exported.

    python tests/exported_projected.py        writes tests/data/projected.jaxexport anew

As in `exported_step`, the file was made by the oldest supported JAX and is to stay.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_flashmla import cache, exporting

PATH = Path(__file__).parent / "data" / "projected.jaxexport"
PLATFORMS = ("cpu", "cuda")
PAGES, WIDTH = 4, 640


def step(
    pool: jax.Array,
    projected: jax.Array,
    slots: jax.Array,
    latent_norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    """Appends a token to each request."""
    rotation = {"cos": cos, "sin": sin, "rope_interleave": True}
    return cache.append_projected(
        pool, projected, slots, latent_norm=latent_norm, norm_eps=1e-6, **rotation
    )


def shapes(rows: object) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Descriptions of the arguments, for a number of rows that may be symbolic."""
    half, f32 = jnp.bfloat16, jnp.float32
    described = (
        ((PAGES, 64, 1, 576), half),
        ((rows, WIDTH), half),
        ((rows,), jnp.int32),
        ((512,), half),
        *[((rows, 32), f32)] * 2,
    )
    return tuple(jax.ShapeDtypeStruct(*x) for x in described)


def arguments(rows: int) -> tuple[jax.Array, ...]:
    """Values of the arguments."""
    rng = np.random.default_rng(rows)
    values = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes(rows)]
    values[2] = jnp.asarray(rng.permutation(PAGES * 64)[:rows], jnp.int32)
    return tuple(values)


def exported() -> export.Exported:
    """The program, for both platforms and any number of rows."""
    (rows,) = export.symbolic_shape("n", constraints=["n <= 1073741823"])
    checks = exporting.disabled_checks()
    made = export.export(jax.jit(step), platforms=PLATFORMS, disabled_checks=checks)
    return made(*shapes(rows))


if __name__ == "__main__":
    PATH.write_bytes(exported().serialize())
