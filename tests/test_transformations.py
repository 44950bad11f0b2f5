"""The ops under JAX's transformations: the same bits as the plain call, or a named error."""

import functools
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_flashmla
from jax_flashmla import _dispatch
from jax_flashmla.testing import cases, inputs

Arrays = tuple[jax.Array, ...]
SHAPE = cases.Shape(4, 2, 4, pages=3, pool_pages=16)
PARTS = 5
POOL = 2  # position of the pool among the arrays

decode = functools.partial(
    jax_flashmla.mla_decode, softmax_scale=SHAPE.softmax_scale, num_sm_parts=PARTS
)


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return inputs.make_inputs(cases.Case(SHAPE)).arrays()


@pytest.fixture(scope="module")
def plain(arrays: Arrays) -> Arrays:
    return decode(*arrays)


def assert_same(got: object, expected: object) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(x, np.float32), np.asarray(y, np.float32), strict=True
        ),
        tuple(got),
        tuple(expected),
    )


def schedule_of(arrays: Arrays) -> Arrays:
    return jax_flashmla.get_mla_metadata(arrays[4], 8, 1, num_sm_parts=PARTS)


def test_jit_and_nested_jit(arrays: Arrays, plain: Arrays) -> None:
    assert_same(jax.jit(decode)(*arrays), plain)
    assert_same(jax.jit(lambda *x: jax.jit(decode)(*x))(*arrays), plain)


def test_disable_jit(arrays: Arrays, plain: Arrays) -> None:
    with jax.disable_jit():
        assert_same(decode(*arrays), plain)


def test_x64_mode(arrays: Arrays, plain: Arrays) -> None:
    with jax.enable_x64(True):
        assert_same(jax.jit(decode)(*arrays), plain)
        assert [x.dtype for x in schedule_of(arrays)] == [jnp.int32, jnp.int32]


def test_eval_shape(arrays: Arrays, plain: Arrays) -> None:
    described = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    shapes = jax.eval_shape(decode, *described)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in plain]


def test_checkpoint(arrays: Arrays, plain: Arrays) -> None:
    assert_same(jax.jit(jax.checkpoint(decode))(*arrays), plain)


def three_layers(arrays: Arrays) -> jax.Array:
    """Layer after layer by plain calls, the output of one being the queries of the next."""
    q_latent = arrays[0]
    for _ in range(3):
        q_latent, _ = decode(q_latent, *arrays[1:])
    return q_latent


def test_scan_over_layers_sharing_a_schedule(arrays: Arrays) -> None:
    @jax.jit
    def run(arrays: Arrays) -> jax.Array:
        schedule = schedule_of(arrays)
        tables = jnp.stack([arrays[3]] * 3)

        def layer(q_latent: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
            operands = q_latent, arrays[1], arrays[2], table, arrays[4]
            return decode(*operands, schedule=schedule)

        return jax.lax.scan(layer, arrays[0], tables)[0]

    assert_same([run(arrays)], [three_layers(arrays)])


def test_while_loop(arrays: Arrays) -> None:
    @jax.jit
    def run(arrays: Arrays) -> jax.Array:
        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + 1, decode(state[1], *arrays[1:])[0]

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (jnp.int32(0), arrays[0]))[1]

    assert_same([run(arrays)], [three_layers(arrays)])


def test_fori_loop_with_a_donated_array_in_the_carry(arrays: Arrays, plain: Arrays) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def run(record: jax.Array, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        def body(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            record, q_latent = state
            out, lse = decode(q_latent, *arrays[1:])
            return record.at[i].set(lse), out

        return jax.lax.fori_loop(0, 3, body, (record, arrays[0]))

    record = jnp.zeros((3, *plain[1].shape))
    filled, q_latent = run(record, arrays)
    assert record.is_deleted()
    assert_same([q_latent, filled[0]], [three_layers(arrays), plain[1]])


@pytest.mark.parametrize("mapped", [(0,), (4,), (0, 1, 3, 4), (3,)], ids=str)
def test_vmap_folds_the_mapped_axis_into_the_batch(arrays: Arrays, mapped: tuple[int, ...]) -> None:
    other = [jnp.flip(x, axis=0) if i in mapped else x for i, x in enumerate(arrays)]
    stacked = [
        jnp.stack([x, y], axis=1) if i in mapped else x
        for i, (x, y) in enumerate(zip(arrays, other, strict=True))
    ]
    in_axes = tuple(1 if i in mapped else None for i in range(len(arrays)))
    out, lse = jax.jit(jax.vmap(decode, in_axes))(*finite_where(stacked))
    for i, row in enumerate((arrays, other)):
        assert_same((out[i], lse[i]), decode(*finite_where(row)))


def finite_where(arrays: Arrays) -> Arrays:
    """Without the poison: a table mapped without its lengths reads what no request was to read."""
    return tuple(jnp.nan_to_num(x) if i == POOL else x for i, x in enumerate(arrays))


def test_nested_vmap(arrays: Arrays, plain: Arrays) -> None:
    inner = jax.vmap(decode, (0, 0, None, 0, 0))
    outer = jax.vmap(inner, (0, 0, None, None, None))
    twice = [x if i == POOL else jnp.stack([x, x]) for i, x in enumerate(arrays)]
    queries = [jnp.stack([x] * 3) for x in twice[:2]]
    out, lse = outer(*queries, *twice[2:])
    assert out.shape == (3, 2, *plain[0].shape)
    assert_same((out[2, 1], lse[2, 1]), plain)


def test_vmap_drops_a_mapped_schedule_and_schedules_the_larger_batch(
    arrays: Arrays, plain: Arrays
) -> None:
    def step(*arrays: jax.Array) -> Arrays:
        return decode(*arrays, schedule=schedule_of(arrays))

    mapped = jax.vmap(step, (0, 0, None, 0, 0))
    operands = [x if i == POOL else jnp.stack([x, x]) for i, x in enumerate(arrays)]
    out, lse = mapped(*operands)
    assert_same((out[1], lse[1]), plain)
    decodes = [e for e in equations(jax.make_jaxpr(mapped)(*operands)) if e[0] == "mla_decode"]
    assert decodes == [("mla_decode", ((PARTS, 8), (2 * SHAPE.batch + 1,)))]


def equations(closed: jax.extend.core.ClosedJaxpr) -> list[tuple[str, tuple]]:
    """Every primitive with the shapes of its last two operands, also in inner programs."""
    found = []
    for equation in closed.jaxpr.eqns:
        found.append((equation.primitive.name, tuple(x.aval.shape for x in equation.invars[-2:])))
        inner = [v for v in equation.params.values() if isinstance(v, jax.extend.core.ClosedJaxpr)]
        found += [e for program in inner for e in equations(program)]
    return found


def test_vmapped_metadata_maps_row_by_row() -> None:
    rows = jnp.asarray([[0, 700, 64, 5], [9000, 1, 1, 1], [0, 0, 0, 0]], jnp.int32)
    one = functools.partial(jax_flashmla.get_mla_metadata, num_sm_parts=PARTS)
    metadata, num_splits = jax.vmap(lambda row: one(row, 16, 1))(rows)
    for i in range(3):
        assert_same((metadata[i], num_splits[i]), one(rows[i], 16, 1))


def test_a_mapped_pool_is_a_named_error(arrays: Arrays) -> None:
    pools = jnp.stack([arrays[POOL]] * 2)
    with pytest.raises(ValueError, match="kv_cache: got a page pool mapped by vmap, expected one"):
        jax.vmap(decode, (None, None, 0, None, None))(*arrays[:2], pools, *arrays[3:])


def test_vmap_over_nothing(arrays: Arrays, plain: Arrays) -> None:
    none = jnp.zeros((0, *arrays[0].shape), arrays[0].dtype)
    got = jax.vmap(decode, (0, None, None, None, None))(none, *arrays[1:])
    assert [x.shape for x in got] == [(0, *x.shape) for x in plain]


def host_mesh(axis_type: AxisType, axes: dict[str, int] | None = None) -> jax.sharding.Mesh:
    axes = axes or {"data": 4}
    devices = jax.local_devices(backend="cpu")[:4]
    kinds = (axis_type,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def placed(arrays: Arrays, mesh: jax.sharding.Mesh) -> Arrays:
    """Requests over the devices, the pool on each of them."""
    return tuple(
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, SPECS, strict=True)
    )


ROWS = PartitionSpec("data")
SPECS = (ROWS, ROWS, PartitionSpec(), ROWS, ROWS)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map(arrays: Arrays, plain: Arrays, axis_type: AxisType, check_vma: bool) -> None:
    mesh = host_mesh(axis_type)
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=SPECS, out_specs=ROWS, check_vma=check_vma)
    assert_same(jax.jit(mapped)(*placed(arrays, mesh)), plain)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_over_one_axis_of_two(
    arrays: Arrays, plain: Arrays, axis_type: AxisType, check_vma: bool
) -> None:
    mesh = host_mesh(axis_type, {"data": 2, "model": 2})
    specs = {"in_specs": SPECS, "out_specs": ROWS, "check_vma": check_vma}
    mapped = jax.shard_map(decode, mesh=mesh, axis_names={"data"}, **specs)
    assert_same(jax.jit(mapped)(*placed(arrays, mesh)), plain)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_lengths_alone(arrays: Arrays, plain: Arrays, check_vma: bool) -> None:
    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        lambda *arrays: decode(*arrays[:4], arrays[4].reshape(-1)),
        mesh=host_mesh(AxisType.Auto),
        in_specs=(everywhere,) * 4 + (ROWS,),
        out_specs=ROWS,
        check_vma=check_vma,
    )
    lengths = jnp.stack([arrays[4]] * 4)
    out, lse = jax.jit(mapped)(*arrays[:4], lengths)
    batch = SHAPE.batch
    for i in range(4):
        assert_same((x[i * batch : (i + 1) * batch] for x in (out, lse)), plain)


def test_shard_map_of_replicated_arrays(arrays: Arrays, plain: Arrays) -> None:
    mesh = host_mesh(AxisType.Auto)
    everywhere = PartitionSpec()
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=(everywhere,) * 5, out_specs=everywhere)
    assert_same(jax.jit(mapped)(*arrays), plain)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_around_a_shared_schedule(arrays: Arrays, plain: Arrays, check_vma: bool) -> None:
    def step(*arrays: jax.Array) -> Arrays:
        return decode(*arrays, schedule=schedule_of(arrays))

    mesh = host_mesh(AxisType.Auto)
    specs = {"in_specs": SPECS, "out_specs": ROWS, "check_vma": check_vma}
    assert_same(jax.shard_map(step, mesh=mesh, **specs)(*placed(arrays, mesh)), plain)


def test_explicit_mesh_with_replicated_arrays(arrays: Arrays, plain: Arrays) -> None:
    mesh = host_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        everywhere = [jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for x in arrays]
        assert_same(jax.jit(decode)(*everywhere), plain)


def test_export_round_trip(arrays: Arrays, plain: Arrays) -> None:
    exported = jax.export.export(jax.jit(decode))(*arrays)
    assert_same(jax.export.deserialize(exported.serialize()).call(*arrays), plain)


def test_export_for_two_platforms(
    arrays: Arrays, plain: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "local_gpu", lambda: None)
    allowed = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_flashmla_{op}")
        for op in ("schedule", "decode")
    ]
    export = jax.export.export(jax.jit(decode), platforms=("cpu", "cuda"), disabled_checks=allowed)
    exported = jax.export.deserialize(export(*arrays).serialize())
    assert exported.platforms == ("cpu", "cuda")
    assert_same(exported.call(*arrays), plain)


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"s_q": 0}, {"pool_pages": 0}, {"pages": 0}],
    ids=str,
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_nothing_to_attend_gives_empty_results(sizes: dict[str, int], wrap: Callable) -> None:
    dims = {"batch": 2, "s_q": 1, "h_q": 4, "pages": 3, "pool_pages": 2} | sizes
    rows = dims["batch"], dims["s_q"], dims["h_q"]
    half = functools.partial(jnp.ones, dtype=jnp.float16)
    q, pool = half((*rows, 576)), half((dims["pool_pages"], 64, 1, 576))
    table = jnp.ones((dims["batch"], dims["pages"]), jnp.int32)
    rest = pool, table, jnp.ones(dims["batch"], jnp.int32)
    out, lse = wrap(decode)(q[..., :512], q[..., 512:], *rest)
    assert_same((out, lse), (half((*rows, 512)) * 0, jnp.full(rows, -jnp.inf)))
    flash = jax_flashmla.flash_mla_with_kvcache
    out, lse = wrap(lambda *x: flash(*x, 512, None, None))(q, *rest)
    assert_same((out, lse.transpose(0, 2, 1)), (half((*rows, 512)) * 0, jnp.full(rows, jnp.inf)))


def loss(q_latent: jax.Array, arrays: Arrays) -> jax.Array:
    return decode(q_latent, *arrays[1:])[0].astype(jnp.float32).sum()


DERIVATIVES = {
    "grad": lambda arrays: jax.grad(loss)(arrays[0], arrays),
    "jvp": lambda arrays: jax.jvp(lambda q: loss(q, arrays), arrays[:1], arrays[:1]),
    "vjp": lambda arrays: jax.vjp(lambda *x: decode(*x, *arrays[3:]), *arrays[:3]),
    "linearize": lambda arrays: jax.linearize(lambda q: loss(q, arrays), arrays[0]),
    "jit": lambda arrays: jax.jit(jax.grad(loss))(arrays[0], arrays),
    "checkpoint": lambda arrays: jax.grad(jax.checkpoint(loss))(arrays[0], arrays),
    "vmap": lambda arrays: jax.vmap(jax.grad(loss), (0, None))(arrays[0][None], arrays),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_refused_by_one_error(arrays: Arrays, name: str) -> None:
    with pytest.raises(NotImplementedError, match="inference-only: MLA decode has no derivative"):
        DERIVATIVES[name](arrays)


def test_stop_gradient_lets_the_rest_be_differentiated(arrays: Arrays) -> None:
    def rest(weight: jax.Array) -> jax.Array:
        q_latent = jax.lax.stop_gradient(arrays[0] * weight)
        return weight.astype(jnp.float32) * loss(q_latent, arrays)

    one = jnp.ones((), jnp.bfloat16)
    np.testing.assert_allclose(
        np.float32(jax.grad(rest)(one)), np.float32(loss(arrays[0], arrays)), rtol=1e-2
    )
