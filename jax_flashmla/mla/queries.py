"""The absorbed query projection: one kernel for x to the queries that `mla_decode` takes."""

import jax

from jax_flashmla import _dispatch, _queries, _shapes
from jax_flashmla._dispatch import Implementation


def absorbed_queries(
    x: jax.Array,
    query_up: jax.Array,
    key_up: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    rope_interleave: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Projects hidden states, or their low-rank form, to absorbed queries.

    In four lines, of which the kernel is one::

        q = jnp.einsum("bsr,rhd->bshd", x, query_up)
        q_nope, q_rope = jnp.split(q, [-64], axis=-1)
        q_rope = rotate(q_rope, cos[..., None, :], sin[..., None, :], interleave=rope_interleave)
        q_latent = jnp.einsum("bshn,hnc->bshc", q_nope, key_up)

    Products are summed in float32 and rounded where they are arrays above. The kernel reads a
    head's two weights in one go and never writes q_nope. Up to 128 tokens it takes the time that
    the weights take; beyond them None means XLA's products. It has qk_nope_head_dim 128 and 192 and
    widths that are multiples of 64.

    Over a mesh batch, queries and heads may be sharded; weights that are sharded otherwise are
    gathered. Absorption is that of DeepSeek-V2 (arXiv:2405.04434, 2.1.2).

    Args:
        x: `[b, s_q, width]`, bfloat16, float16 or float32: normalised hidden states, or their
            normalised low-rank form where the model has a q_lora_rank.
        query_up: W_Q `[width, h_q, qk_nope_head_dim + 64]` of the same dtype.
        key_up: W_UK `[h_q, qk_nope_head_dim, 512]` of the same dtype.
        cos: float32 `[b, s_q, 32]`, as `cos_sin` gives it.
        sin: float32 `[b, s_q, 32]`.
        rope_interleave: as in `jax_flashmla.rope.rotate`.
        implementation: "cuda" for the kernel or an error that says why it cannot run, "xla" for
            XLA's products, None for the kernel where it can run and is faster.

    Returns:
        q_latent `[b, s_q, h_q, 512]` and rotated q_rope `[b, s_q, h_q, 64]`.

    Raises:
        ValueError: a shape or sharding is wrong.
        TypeError: a dtype is wrong, or a static argument is traced.
        RuntimeError: `implementation="cuda"` cannot run on the platform that is lowered for.
        NotImplementedError: it is differentiated.
    """
    arrays = _shapes.as_arrays(x=x, query_up=query_up, key_up=key_up, cos=cos, sin=sin)
    interleave = _shapes.check_flag("rope_interleave", rope_interleave)
    _queries.check(*arrays)
    _dispatch.check_request(implementation, _queries.refusal(*arrays))
    q_latent, q_rope = _queries.absorbed_queries(
        arrays, interleave=interleave, implementation=implementation
    )
    return q_latent, q_rope
