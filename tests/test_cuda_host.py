"""The CUDA code that needs no GPU: layout, schedule and work items, compiled for the host."""

import json
from pathlib import Path

import barrier_layout
import cuda_host
import few_rows_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashmla.schedule import plan

LONGEST = 2**31 - 1

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_host.build(tmp_path_factory.mktemp("cuda_host"))


def edge_cases() -> list[tuple[int, list[int]]]:
    return [
        (1, [0]),
        (1, [1]),
        (132, [64]),
        (132, [0] * 40),
        (7, [-5, 0, 129, -(2**31), 64]),
        (500, [8192, 100]),
        (132, [LONGEST]),
        (1, [LONGEST] * 300),
        (3, [LONGEST] * 300),
        (132, [LONGEST, 0, 1, LONGEST]),
        (66, [4096] * 64),
        (66, [1024] * 128),
        (132, [4096 + 64 * r for r in range(33)]),
        (66, [8192] * 32),  # two pieces each instead of three
        (132, [64] * 1024),
        (132, [64] * 1025),  # too many requests to compare shares
    ]


def random_cases(seed: int) -> list[tuple[int, list[int]]]:
    """Cases over few (batch, parts), each of which JAX compiles once."""
    rng = np.random.default_rng(seed)
    cases = []
    for batch, parts in ((1, 132), (5, 33), (40, 132), (129, 66), (300, 7)):
        for longest in (64, 500, 5000, 100_000):
            lengths = rng.integers(0, longest, batch)
            lengths[rng.random(batch) < rng.choice([0.0, 0.5])] = 0
            cases.append((parts, lengths.tolist()))
    return cases


def test_host_schedule_is_the_schedule_of_jax(program: Path) -> None:
    cases = edge_cases() + random_cases(seed=3)
    lines = [" ".join(map(str, (parts, len(lengths), *lengths))) for parts, lengths in cases]
    printed = cuda_host.run(program, "schedule", "\n".join(lines) + "\n").splitlines()
    jitted_plan = jax.jit(plan, static_argnums=1)
    for (parts, lengths), line in zip(cases, printed, strict=True):
        got = np.array(line.split(), np.int64)
        metadata, num_splits = jitted_plan(jnp.asarray(lengths, jnp.int32), parts)
        message = f"{parts} parts, lengths {lengths}"
        want = np.concatenate([np.asarray(metadata).ravel(), np.asarray(num_splits)])
        np.testing.assert_array_equal(got, want, message)


def test_dividing_by_multiplication_is_exact(program: Path) -> None:
    cuda_host.run(program, "divisions")


def test_work_items_stay_inside_whatever_the_metadata(program: Path) -> None:
    cuda_host.run(program, "work")


def test_the_simulators_have_the_constants_of_the_kernels(program: Path) -> None:
    assert json.loads(cuda_host.run(program, "constants")) == barrier_layout.CONSTANTS
    assert json.loads(cuda_host.run(program, "few")) == few_rows_layout.CONSTANTS
