"""What all primitives share: their definition, the choice of path, no derivative, vmap's folding.

Each primitive is device-local. Its lowering for CUDA is the FFI custom call, its lowering for any
other platform the pure-JAX definition; `_dispatch` may choose the latter on CUDA too.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla

from jax_flashmla import _dispatch, _mesh
from jax_flashmla._dispatch import Implementation

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a primitive is. Each function but `refusal` also takes the static arguments, by name.

    Attributes:
        operation: what warnings and errors call it.
        results: abstract evaluation: descriptions of the operands to those of the results.
        kernel: calls the FFI target.
        portable: the same in pure JAX.
        refusal: says why the operands have no kernel, None when they have one.
        collective: whether any of them communicates. XLA keeps such branches of other platforms, so
            a program that is lowered for several at once gets the portable one.
    """

    operation: str
    results: Callable
    kernel: Callable
    portable: Callable
    refusal: Callable[..., str | None] = lambda *_: None
    collective: bool = False


def define(primitive: Primitive, rules: Rules) -> None:
    """Gives a primitive, with several results and the argument `implementation`, its rules."""
    primitive.multiple_results = True
    primitive.def_abstract_eval(rules.results)
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    on_cuda, elsewhere = (_lowering(rules, platform) for platform in ("cuda", "another one"))
    if not rules.collective:
        mlir.register_lowering(primitive, on_cuda, platform="cuda")
        mlir.register_lowering(primitive, elsewhere)
        return

    def for_the_platforms(
        ctx: mlir.LoweringRuleContext, *operands: object, **static: object
    ) -> object:
        cuda_alone = tuple(ctx.module_context.platforms) == ("cuda",)
        return (on_cuda if cuda_alone else elsewhere)(ctx, *operands, **static)

    mlir.register_lowering(primitive, for_the_platforms)


def _lowering(rules: Rules, platform: str) -> Callable:
    """Chooses between kernel and portable definition when a program is lowered."""

    def chosen(*operands: jax.Array, implementation: Implementation, **static: object) -> Sequence:
        refusal = rules.refusal(*operands)
        kernel = _dispatch.takes_kernel(rules.operation, implementation, refusal, platform)
        function = rules.kernel if kernel else rules.portable
        return function(*operands, implementation=implementation, **static)

    return mlir.lower_fun(chosen, multiple_results=True)


def inference_only(operation: str, function: Callable) -> Callable:
    """Lets every derivative of a function end in one error that says so."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def refuse(primals: Sequence, tangents: Sequence) -> NoReturn:
        del primals, tangents
        raise NotImplementedError(
            f"jax_flashmla is inference-only: {operation} has no derivative. Where it appears"
            " inside a differentiated function, pass its inputs through jax.lax.stop_gradient."
        )

    return _mesh.compiled(wrapped)


def fold_leading(axis_size: int, in_batched: Sequence[bool], arrays: Sequence[jax.Array]) -> Arrays:
    """Folds a mapped axis into the first one; what is not mapped is repeated."""
    full = spread(axis_size, in_batched, arrays)
    return tuple(x.reshape(axis_size * x.shape[1], *x.shape[2:]) for x in full)


def spread(axis_size: int, in_batched: Sequence[bool], arrays: Sequence[jax.Array]) -> Arrays:
    """Gives every array the mapped axis, in front."""
    return tuple(
        x if batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
        for x, batched in zip(arrays, in_batched, strict=True)
    )
