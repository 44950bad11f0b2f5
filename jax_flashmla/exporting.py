"""What `jax.export` has to be told to serialise programs that hold this package's custom calls.

    from jax import export

    (b,) = export.symbolic_shape("b", constraints=[MAX_SYMBOLIC_BATCH])
    ...
    exported = export.export(step, platforms=["cuda"], disabled_checks=disabled_checks())(*shapes)
    path.write_bytes(exported.serialize())

The targets and what they take are a stable interface: the program runs wherever this package, in
the same or a later version, is imported. A host without a GPU exports for CUDA as well.
"""

from jax import export

from jax_flashmla import _ffi
from jax_flashmla.schedule import MAX_CANDIDATE_BATCH, Schedule

TARGETS = _ffi.TARGETS
MAX_SYMBOLIC_BATCH = f"b <= {MAX_CANDIDATE_BATCH}"

export.register_namedtuple_serialization(Schedule, serialized_name="jax_flashmla.Schedule")


def disabled_checks() -> tuple[export.DisabledSafetyCheck, ...]:
    """Returns the argument of `jax.export.export` that lets it serialise the custom calls.

    JAX guarantees for years only what its own custom calls do; this package gives its word for
    `TARGETS`.
    """
    return tuple(export.DisabledSafetyCheck.custom_call(target) for target in TARGETS)
