"""Refuses to export what `jax.export` cannot hold: the partitioner's callbacks under Auto axes."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

guard_p = Primitive("flashmla_auto_export_guard")


def guard(operand: jax.Array) -> jax.Array:
    """Returns the operand; lowering it for export, over several devices, is an error.

    Raises:
        ValueError: when it is lowered so.
    """
    return guard_p.bind(operand)


def _lowered(ctx: mlir.LoweringRuleContext, operand: object) -> list[object]:
    """Where JAX hides what is asked here, its own error follows."""
    module = ctx.module_context
    exported = getattr(getattr(module, "lowering_parameters", None), "for_export", False)
    context = getattr(module, "axis_context", None)
    mesh = getattr(context, "mesh", None)
    devices = mesh.size if mesh is not None else getattr(context, "num_devices", 1)
    if exported and devices > 1:
        raise ValueError(
            f"export: got jax_flashmla over Auto axes of a mesh of {devices} devices, which"
            " jax.export cannot serialise, expected Explicit axes (the default of jax.make_mesh,"
            " with jax.set_mesh) or a jax.shard_map over all axes"
        )
    return [operand]


guard_p.def_impl(lambda operand: operand)
guard_p.def_abstract_eval(lambda operand: operand)
mlir.register_lowering(guard_p, _lowered)
