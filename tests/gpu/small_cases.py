"""A few small decode steps through JAX on the GPU, checked on the host; for compute-sanitizer.

Data and oracle are the host's, so that nearly all the GPU runs is ours.
"""

import sys

import jax
import numpy as np

import jax_flashmla
from jax_flashmla.testing import compare, inputs, oracle
from jax_flashmla.testing.cases import Case, Shape

CASES = (
    Case(Shape(2, 1, 16, pages=4, pool_pages=12), "around_pages", "sigma1", seed=1),
    Case(Shape(3, 2, 40, pages=4, pool_pages=12, num_sm_parts=5), "edges", "rising", seed=2),
    Case(Shape(2, 1, 8, h_kv=2, pages=3, pool_pages=8, dtype="float16"), "full", "sigma5"),
)


def faults(case: Case) -> tuple[str, ...]:
    """What is wrong with the kernel's result."""
    shape = case.shape
    options = {"softmax_scale": shape.softmax_scale, "causal": shape.causal}
    with jax.default_device(jax.devices("cpu")[0]):
        data = inputs.make_inputs(case)
    q_latent, q_rope, *rest = map(np.asarray, data.arrays())
    on_gpu = jax.device_put((q_latent, q_rope, *rest), jax.devices()[0])
    decode = jax.jit(
        lambda *arrays: jax_flashmla.mla_decode(
            *arrays, num_sm_parts=shape.num_sm_parts, implementation="cuda", **options
        )
    )
    out, lse = map(np.asarray, decode(*on_gpu))
    truth = oracle.attend(np.concatenate([q_latent, q_rope], axis=-1), *rest, **options)
    return compare.compare(out, lse, truth).faults


def main() -> int:
    found = {case.name: faults(case) for case in CASES}
    for name, words in found.items():
        print(name, "; ".join(words) or "ok")
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main())
