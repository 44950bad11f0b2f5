"""Append and gather on the GPU: bits against loops in NumPy, in place, in loops and graphs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla import cache
from jax_flashmla.testing import cache_oracle
from jax_flashmla.testing.cache_oracle import bits, random_bits

PAGES = 40
DTYPES = ("bfloat16", "float16")
Arrays = tuple[np.ndarray, ...]


@pytest.fixture
def append(implementation: str) -> functools.partial:
    return functools.partial(cache.append, implementation=implementation)


@pytest.fixture
def gather(implementation: str) -> functools.partial:
    return functools.partial(cache.gather, implementation=implementation)


@pytest.fixture
def make_bits(rehearsal: bool) -> functools.partial:
    return functools.partial(random_bits, payloads=not rehearsal)


def rows_and_slots(n: int, dtype: str, seed: int = 0) -> Arrays:
    """Pool, latent, rope and slots: distinct slots, every third row has a bad one."""
    rng = np.random.default_rng(seed)
    bad = np.int32([-1, -64, -(2**31), PAGES * 64, PAGES * 64 + 1, 2**31 - 1])
    slots = rng.permutation(PAGES * 64)[:n].astype(np.int32)
    slots[::3] = np.resize(bad, len(slots[::3]))
    latent, rope = (
        rng.standard_normal((n, d), np.float32).astype(jnp.dtype(dtype)) for d in (512, 64)
    )
    return random_bits(rng, PAGES, 64, 1, 576, dtype=dtype), latent, rope, slots


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 31, 128, 129, 1000, PAGES * 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_moves_bits_and_skips_slots_outside(
    n: int, dtype: str, append: functools.partial, make_bits: functools.partial
) -> None:
    rng = np.random.default_rng(n)
    slots = rows_and_slots(n, dtype)[-1]
    pool, latent, rope = (
        make_bits(rng, *s, dtype=dtype) for s in ((PAGES, 64, 1, 576), (n, 512), (n, 64))
    )
    got = append(pool, latent, rope, slots)
    expected = cache_oracle.append(pool, np.concatenate([latent, rope], axis=1), slots)
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_rotates_the_key_and_rounds_once(
    n: int, interleave: bool, dtype: str, append: functools.partial
) -> None:
    pool, latent, rope, slots = rows_and_slots(n, dtype)
    angles = np.random.default_rng(n).uniform(-9, 9, (n, 32))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    got = append(pool, latent, rope, slots, cos=cos, sin=sin, rope_interleave=interleave)
    written = np.flatnonzero((slots >= 0) & (slots < PAGES * 64))
    tokens = np.array(got).reshape(-1, 576)
    exact = cache_oracle.rotate(*(x[written] for x in (rope, cos, sin)), interleave=interleave)
    assert exact.faults(tokens[slots[written], 512:]) == 0
    tokens[slots[written], 512:] = rope[written]
    expected = cache_oracle.append(pool, np.concatenate([latent, rope], axis=1), slots)
    np.testing.assert_array_equal(bits(tokens), bits(expected).reshape(-1, 576))


@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("width", [576, 2112])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projected_rows_are_normed_and_rotated_and_rounded_once(
    n: int, width: int, interleave: bool, dtype: str, implementation: str
) -> None:
    rng = np.random.default_rng(n)
    pool, _, _, slots = rows_and_slots(n, dtype)
    angles = rng.uniform(-9, 9, (n, 32))
    sizes = np.logspace(-2, 2, n)[:, None]
    arrays = {
        "cache": pool,
        "projected": (rng.standard_normal((n, width)) * sizes).astype(pool.dtype),
        "latent_norm": (1 + 0.3 * rng.standard_normal(512)).astype(pool.dtype),
        "slots": slots,
        "cos": np.float32(np.cos(angles)),
        "sin": np.float32(np.sin(angles)),
    }
    options = {"rope_interleave": interleave, "implementation": implementation}
    got = cache.append_projected(**arrays, norm_eps=1e-6, **options)
    assert cache_oracle.projected_faults(got, arrays, eps=1e-6, interleave=interleave) == 0


@pytest.mark.parametrize("h_kv", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_copies_pages_and_zeros_the_rest(
    h_kv: int, width: int, dtype: str, gather: functools.partial, make_bits: functools.partial
) -> None:
    """Tails, unused pages and the memory of the result are full of anything, NaN included."""
    rng = np.random.default_rng(width)
    pool = make_bits(rng, PAGES, 64, h_kv, 576, dtype=dtype)
    lengths = np.int32([0, 1, 63, 64, 65, 64 * width - 1, 64 * width, 9999, -5, -(2**31)])
    table = rng.integers(0, PAGES, (len(lengths), width)).astype(np.int32)
    bad = rng.uniform(size=table.shape) < 0.2
    table[bad] = np.resize(np.int32([-1, PAGES, 2147480000, -(2**31)]), bad.sum())
    got = gather(pool, table, lengths)
    np.testing.assert_array_equal(bits(got), bits(cache_oracle.gather(pool, table, lengths)))


def test_gather_of_many_requests(gather: functools.partial, rehearsal: bool) -> None:
    batch = 3 if rehearsal else 300
    rng = np.random.default_rng(0)
    pool = random_bits(rng, PAGES, 64, 1, 576, dtype="bfloat16")
    table = rng.integers(-2, PAGES + 2, (batch, 4)).astype(np.int32)
    lengths = rng.integers(0, 257, batch).astype(np.int32)
    got = gather(pool, table, lengths)
    np.testing.assert_array_equal(bits(got), bits(cache_oracle.gather(pool, table, lengths)))


def test_a_pool_of_more_than_two_to_the_31_elements(
    append: functools.partial, gather: functools.partial, rehearsal: bool
) -> None:
    pages = 70 if rehearsal else 60_000
    pool = cache.make_pool(1, pages)
    slots = np.int32([0, pages * 64 - 1, (pages - 1) * 64, 40 * 64 + 3, pages * 64])
    latent = np.arange(1, 6, dtype=np.float32)[:, None] * np.ones((5, 512), np.float32)
    rows = jnp.asarray(latent, jnp.bfloat16), jnp.asarray(-latent[:, :64], jnp.bfloat16)
    pool = jax.jit(append, donate_argnums=0)(pool, *rows, slots)
    table, lengths = np.int32([[pages - 1], [0], [40], [pages]]), np.full(4, 64, np.int32)
    got = np.asarray(gather(pool, table, lengths)[:, :, 0], np.float32)
    expected = np.zeros((4, 64, 576), np.float32)
    for value, (request, token) in zip(range(1, 5), ((1, 0), (0, 63), (0, 0), (2, 3)), strict=True):
        expected[request, token] = np.where(np.arange(576) < 512, value, -value)
    np.testing.assert_array_equal(got, expected)


# In place.


def test_a_donated_pool_keeps_its_address(append: functools.partial) -> None:
    pool, *rows = map(jnp.asarray, rows_and_slots(9, "bfloat16"))
    expected = bits(append(pool, *rows))
    address = pool.unsafe_buffer_pointer()
    written = jax.jit(append, donate_argnums=0)(pool, *rows)
    assert pool.is_deleted()
    assert written.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(bits(written), expected)


def test_a_pool_that_is_not_donated_is_left_alone(append: functools.partial) -> None:
    pool, *rows = rows_and_slots(9, "bfloat16")
    given = jnp.asarray(pool)
    changed = append(given, *rows)
    np.testing.assert_array_equal(bits(given), bits(pool))
    assert (bits(changed) != bits(pool)).any()


@pytest.mark.parametrize("loop", ["fori", "scan", "while"])
def test_loops_write_in_place_what_plain_calls_write(loop: str, append: functools.partial) -> None:
    pool, latent, rope, slots = map(jnp.asarray, rows_and_slots(120, "float16"))
    expected = bits(append(pool, latent, rope, slots))

    def step(i: jax.Array, pool: jax.Array) -> jax.Array:
        cut = [jax.lax.dynamic_slice_in_dim(x, 12 * i, 12) for x in (latent, rope, slots)]
        return append(pool, *cut)

    def run(pool: jax.Array) -> jax.Array:
        if loop == "fori":
            return jax.lax.fori_loop(0, 10, step, pool)
        if loop == "scan":
            numbers = jnp.arange(10, dtype=jnp.int32)
            return jax.lax.scan(lambda pool, i: (step(i, pool), None), pool, numbers)[0]
        start = jnp.int32(0), pool
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 1, step(*c)), start)[1]

    address = pool.unsafe_buffer_pointer()
    program = jax.jit(run, donate_argnums=0).lower(pool).compile()
    memory = program.memory_analysis()
    written = program(pool)
    assert written.unsafe_buffer_pointer() == address
    assert memory.temp_size_in_bytes < written.nbytes / 2
    np.testing.assert_array_equal(bits(written), expected)


def test_scan_over_layers_appends_and_attends_in_the_flat_pool(
    append: functools.partial, implementation: str
) -> None:
    layers, b, width = 4, 3, 5
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.permutation(PAGES)[: b * width].reshape(b, width), jnp.int32)
    lengths = jnp.asarray([1, 300, 64], jnp.int32)
    slots = table[jnp.arange(b), (lengths - 1) // 64] * 64 + (lengths - 1) % 64

    def decode(x: jax.Array, pool: jax.Array, pages: jax.Array) -> jax.Array:
        arrays = x, x[..., :64], pool, pages, lengths
        return jax_flashmla.mla_decode(*arrays, softmax_scale=0.05, implementation=implementation)[
            0
        ]

    def scanned(x: jax.Array, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(
            carry: tuple[jax.Array, jax.Array], i: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, pool = carry
            row = x[:, 0, 0]
            pool = append(pool, row, row[:, 64:128], cache.layer_slots(slots, i, PAGES))
            return (decode(x, pool, cache.layer_block_table(table, i, PAGES)), pool), None

        return jax.lax.scan(layer, (x, pool), jnp.arange(layers, dtype=jnp.int32))[0]

    x = jnp.asarray(rng.standard_normal((b, 1, 16, 512)), jnp.bfloat16)
    values = rng.standard_normal((layers, PAGES, 64, 1, 576)).astype(np.float32)
    stacked = jnp.asarray(values, jnp.bfloat16)
    pool = jnp.array(stacked.reshape(-1, 64, 1, 576))
    address = pool.unsafe_buffer_pointer()
    got, written = jax.jit(scanned, donate_argnums=1)(x, pool)
    assert written.unsafe_buffer_pointer() == address
    for i in range(layers):
        row = x[:, 0, 0]
        own = append(stacked[i], row, row[:, 64:128], slots)
        np.testing.assert_array_equal(bits(written[i * PAGES : (i + 1) * PAGES]), bits(own))
        x = decode(x, own, table)
    np.testing.assert_array_equal(bits(got), bits(x))


# Graphs.


def test_eight_calls_in_one_program_are_right_at_every_replay(
    append: functools.partial, gather: functools.partial
) -> None:
    @functools.partial(jax.jit, donate_argnums=0)
    def chain(pool: jax.Array, latent: jax.Array, rope: jax.Array, slots: jax.Array) -> Arrays:
        table, lengths = slots[None, :3] // 64, jnp.full(1, 150, jnp.int32)
        seen = []
        for i in range(8):
            pool = append(pool, latent, rope, jnp.where(slots < 0, -1, (slots + 64 * i) % 2560))
            seen.append(gather(pool, table, lengths))
        return pool, *seen

    for seed in range(4):
        pool, latent, rope, slots = rows_and_slots(20, "bfloat16", seed)
        got, *seen = chain(jnp.asarray(pool), latent, rope, slots)
        rows = np.concatenate([latent, rope], axis=1)
        table, lengths = slots[None, :3] // 64, np.int32([150])
        for i in range(8):
            at = np.where(slots < 0, -1, (slots.astype(np.int64) + 64 * i).astype(np.int32) % 2560)
            pool = cache_oracle.append(pool, rows, at)
            expected = cache_oracle.gather(pool, table, lengths)
            np.testing.assert_array_equal(bits(seen[i]), bits(expected))
        np.testing.assert_array_equal(bits(got), bits(pool))


# Which path runs, and refusals.


def test_kernels_run_by_default(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the kernels are the GPU's")
    pool, *rows = map(jnp.asarray, rows_and_slots(2, "bfloat16"))
    assert "jax_flashmla_append" in jax.jit(cache.append).lower(pool, *rows).as_text()
    table = jnp.zeros((1, 1), jnp.int32)
    assert "jax_flashmla_gather" in jax.jit(cache.gather).lower(pool, table, table[0]).as_text()


def test_handler_refuses_a_result_that_is_not_the_pool(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("the handlers are the GPU's")
    pool, *rows = map(jnp.asarray, rows_and_slots(2, "bfloat16"))
    shape = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    with pytest.raises(jax.errors.JaxRuntimeError, match="operand 0 aliased"):
        jax.block_until_ready(
            jax.ffi.ffi_call("jax_flashmla_append", shape)(pool, *rows, interleave=False)
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="latent: got"):
        jax.block_until_ready(
            jax.ffi.ffi_call("jax_flashmla_append", shape, input_output_aliases={0: 0})(
                pool, rows[1], rows[0], rows[2], interleave=False
            )
        )
    assert cache.append(pool, *rows).shape == pool.shape
