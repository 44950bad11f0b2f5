"""Append, gather and the flat pool: bits against loops in NumPy, bad slots, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_flashmla
from jax_flashmla import cache
from jax_flashmla.testing import cache_oracle
from jax_flashmla.testing.cache_oracle import bits, random_bits

DTYPES = ("bfloat16", "float16", "float32")
PAGES = 6
BAD_SLOTS = (-1, -64, -(2**31), PAGES * 64, PAGES * 64 + 1, 2**31 - 1)


def random_values(rng: np.random.Generator, *shape: int, dtype: str) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape).astype(np.float32).astype(jnp.dtype(dtype)))


def rows_and_slots(
    n: int, *, dtype: str = "float16", seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pool, latent, rope and slots: distinct slots, every third row has a bad one."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(PAGES * 64)[:n].astype(np.int32)
    slots[::3] = np.resize(np.int32(BAD_SLOTS), len(slots[::3]))
    make = functools.partial(random_bits, rng, dtype=dtype)
    return make(PAGES, 64, 1, 576), make(n, 512), make(n, 64), slots


@pytest.mark.parametrize("n", [1, 2, 63, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_moves_bits_and_skips_slots_outside(n: int, dtype: str) -> None:
    pool, latent, key, slots = rows_and_slots(n, dtype=dtype)
    got = cache.append(pool, latent, key, slots)
    expected = cache_oracle.append(pool, np.concatenate([latent, key], axis=1), slots)
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rotates_the_key_and_rounds_once(dtype: str, interleave: bool) -> None:
    pool, latent, _, slots = rows_and_slots(20, dtype=dtype)
    rng = np.random.default_rng(1)
    key, angles = random_values(rng, 20, 64, dtype=dtype), rng.uniform(-9, 9, (20, 32))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    got = cache.append(pool, latent, key, slots, cos=cos, sin=sin, rope_interleave=interleave)
    written = np.flatnonzero((slots >= 0) & (slots < PAGES * 64))
    rows = np.asarray(got).reshape(-1, 576)[slots[written]]
    np.testing.assert_array_equal(bits(rows[:, :512]), bits(latent[written]))
    exact = cache_oracle.rotate(*(x[written] for x in (key, cos, sin)), interleave=interleave)
    assert exact.faults(rows[:, 512:]) == 0


def test_of_two_rows_for_one_slot_one_is_written_whole() -> None:
    pool, latent, key, _ = rows_and_slots(2, dtype="float32")
    got = cache.append(pool, latent, key, np.int32([70, 70]))
    row = bits(got)[1, 6, 0]
    rows = bits(np.concatenate([latent, key], axis=1))
    assert any(np.array_equal(row, each) for each in rows)


@pytest.mark.parametrize("h_kv", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_copies_pages_and_zeros_the_rest(dtype: str, h_kv: int) -> None:
    rng = np.random.default_rng(h_kv)
    pool = random_bits(rng, PAGES, 64, h_kv, 576, dtype=dtype)
    table = np.int32([[0, 5, 2], [1, -1, 3], [4, 6, 2**31 - 1], [5, 5, 0], [-(2**31), 1, 2]])
    for lengths in ([192, 192, 192, 192, 192], [0, 65, 129, 64, 1], [-3, 127, 128, 9999, 63]):
        got = cache.gather(pool, table, np.int32(lengths))
        expected = cache_oracle.gather(pool, table, np.int32(lengths))
        np.testing.assert_array_equal(bits(got), bits(expected))


def test_what_is_appended_is_what_gather_and_decode_see() -> None:
    pool, latent, key, _ = (x.astype(np.float32) for x in rows_and_slots(70, dtype="float16"))
    pool, latent, key = (np.nan_to_num(x, posinf=0, neginf=0) % 1 for x in (pool, latent, key))
    positions = np.arange(70)
    table = np.int32([[4, 1, -1]])
    slots = table[0, positions // 64] * 64 + positions % 64
    filled = cache.append(pool, latent, key, slots)
    tokens = cache.gather(filled, table, np.int32([70]))[0, :70, 0]
    rows = np.concatenate([latent, key], axis=1)
    np.testing.assert_array_equal(tokens, rows)
    q = np.ones((1, 1, 2, 576), np.float32)
    arrays = q[..., :512], q[..., 512:], filled, table, np.int32([70])
    out, _ = jax_flashmla.mla_decode(*arrays, softmax_scale=0.05)
    weights = jax.nn.softmax(rows.sum(axis=1) * 0.05)
    np.testing.assert_allclose(out[0, 0, 0], weights @ rows[:, :512], rtol=1e-3, atol=1e-5)


def test_pool_is_flat_and_zero() -> None:
    pool = cache.make_pool(3, 5)
    assert (pool.shape, pool.dtype) == ((15, 64, 1, 576), jnp.bfloat16)
    assert not pool.any()
    assert cache.make_pool(1, 1, dtype="float32").dtype == jnp.float32


@pytest.mark.parametrize("layer", [0, 2, np.int64(2), jnp.int32(2)], ids=repr)
def test_layers_offset_valid_entries_only(layer: int) -> None:
    start = int(layer) * 5
    table = np.int32([[0, 4, 5], [-1, 2147480000, -(2**31)]])
    got = cache.layer_block_table(table, layer, 5)
    np.testing.assert_array_equal(got, [[start, start + 4, -1], [-1, -1, -1]], strict=False)
    assert got.dtype == jnp.int32
    slots = cache.layer_slots(np.int32([0, 319, 320, -1, 2**31 - 1]), layer, 5)
    np.testing.assert_array_equal(slots, [start * 64, start * 64 + 319, -1, -1, -1])


def test_layers_keep_apart_in_the_flat_pool() -> None:
    """A page number that is too large for its layer must not reach the next one."""
    pool = cache.make_pool(2, PAGES, dtype="float32")
    slots = np.int32([3, PAGES * 64 + 3, -1])
    rows = jnp.ones((3, 512)), jnp.ones((3, 64))
    pool = cache.append(pool, *rows, cache.layer_slots(slots, 0, PAGES))
    assert np.flatnonzero(np.asarray(pool.any(axis=(2, 3)))).tolist() == [3]


# Transformations.


def test_jit_scan_and_while_loop_write_what_plain_calls_write() -> None:
    pool, latent, key, slots = rows_and_slots(12)

    @jax.jit
    def scanned(pool: jax.Array) -> jax.Array:
        rows = tuple(x.reshape(4, 3, *x.shape[1:]) for x in (latent, key, slots))
        return jax.lax.scan(lambda pool, row: (cache.append(pool, *row), None), pool, rows)[0]

    @jax.jit
    def looped(pool: jax.Array) -> jax.Array:
        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, pool = state
            cut = [jax.lax.dynamic_slice_in_dim(x, 3 * i, 3) for x in (latent, key, slots)]
            return i + 1, cache.append(pool, *cut)

        return jax.lax.while_loop(lambda state: state[0] < 4, body, (jnp.int32(0), pool))[1]

    expected = bits(cache.append(pool, latent, key, slots))
    for run in (scanned, looped):
        np.testing.assert_array_equal(bits(run(pool)), expected)


@pytest.mark.parametrize("rotated", [False, True])
def test_vmap_over_pools_appends_to_each(rotated: bool) -> None:
    pools, latents, keys, slots = map(
        np.stack, zip(*(rows_and_slots(9, dtype="float32", seed=s) for s in (1, 2)), strict=True)
    )
    angles = np.ones((9, 32), np.float32)
    rotation = {"cos": angles, "sin": angles} if rotated else {}
    append = functools.partial(cache.append, **rotation)
    got = jax.jit(jax.vmap(append))(pools, latents, keys, slots)
    shared = jax.vmap(append, (0, None, None, None))(pools, latents[0], keys[0], slots[0])
    for i in range(2):
        expected = append(pools[i], latents[i], keys[i], slots[i])
        np.testing.assert_array_equal(bits(got[i]), bits(expected))
        expected = append(pools[i], latents[0], keys[0], slots[0])
        np.testing.assert_array_equal(bits(shared[i]), bits(expected))


def test_vmap_of_rows_over_one_pool_is_a_named_error() -> None:
    pool, latent, key, slots = rows_and_slots(4)
    with pytest.raises(ValueError, match="cache: got one page pool for rows mapped by vmap"):
        jax.vmap(cache.append, (None, 0, 0, 0))(pool, latent[None], key[None], slots[None])


@pytest.mark.parametrize("in_axes", [(None, 0, 0), (None, 1, None), (0, None, 0), (0, 0, 0)])
def test_vmap_of_gather(in_axes: tuple[int | None, ...]) -> None:
    rng = np.random.default_rng(3)
    one = random_bits(rng, PAGES, 64, 1, 576, dtype="float16"), np.int32([[0, 6], [3, -1]])
    arrays = *one, np.int32([100, 70])
    other = random_bits(rng, PAGES, 64, 1, 576, dtype="float16"), one[1][::-1], np.int32([128, 3])
    stacked = [
        x if axis is None else np.stack([x, y], axis)
        for x, y, axis in zip(arrays, other, in_axes, strict=True)
    ]
    got = jax.jit(jax.vmap(cache.gather, in_axes))(*stacked)
    second = [x if a is None else y for x, y, a in zip(arrays, other, in_axes, strict=True)]
    np.testing.assert_array_equal(bits(got[0]), bits(cache_oracle.gather(*arrays)))
    np.testing.assert_array_equal(bits(got[1]), bits(cache_oracle.gather(*second)))


def test_shard_map_with_a_pool_per_device() -> None:
    devices = jax.local_devices(backend="cpu")[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    pool, latent, key, slots = rows_and_slots(8, dtype="float32")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def step(pool: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        pool = cache.append(pool, *rows)
        tokens = cache.gather(pool, jnp.zeros((1, 1), jnp.int32), jnp.full(1, 64, jnp.int32))
        return pool, jax_flashmla.merge_partials(tokens[..., 0, :], jnp.zeros((1, 64)))[0][None]

    got, tokens = step(pool, latent, key, slots)
    for half in (slice(0, 3), slice(3, 6)):
        rows = slice(0, 4) if half.start == 0 else slice(4, 8)
        expected = cache.append(pool[half], latent[rows], key[rows], slots[rows])
        np.testing.assert_array_equal(bits(got[half]), bits(expected))
    np.testing.assert_array_equal(tokens[1], got[3, :, 0])


def test_shard_map_of_a_pool_that_becomes_different_on_each_device() -> None:
    devices = jax.local_devices(backend="cpu")[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    pool, latent, key, slots = rows_and_slots(8)
    specs = jax.P(), jax.P("data"), jax.P("data"), jax.P("data")
    mapped = jax.shard_map(cache.append, mesh=mesh, in_specs=specs, out_specs=jax.P("data"))
    got = jax.jit(mapped)(pool, latent, key, slots)
    np.testing.assert_array_equal(
        bits(got[PAGES:]), bits(cache.append(pool, latent[4:], key[4:], slots[4:]))
    )


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("pages", [0, 2])
def test_nothing_to_append_or_gather(rows: int, pages: int) -> None:
    pool = jnp.ones((pages, 64, 1, 576))
    slots = jnp.full(rows, -1, jnp.int32)
    got = cache.append(pool, jnp.zeros((rows, 512)), jnp.zeros((rows, 64)), slots)
    np.testing.assert_array_equal(got, pool)
    tokens = cache.gather(pool, jnp.zeros((rows, pages), jnp.int32), jnp.zeros(rows, jnp.int32))
    assert tokens.shape == (rows, pages * 64, 1, 576)


def test_derivatives_are_refused() -> None:
    pool, rows = jnp.zeros((1, 64, 1, 576)), jnp.zeros((1, 512))
    key, slots = jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="inference-only: append has no derivative"):
        jax.grad(lambda latent: cache.append(pool, latent, key, slots).sum())(rows)
    with pytest.raises(NotImplementedError, match="inference-only: gather has no derivative"):
        jax.grad(lambda pool: cache.gather(pool, slots[None], slots).sum())(pool)
