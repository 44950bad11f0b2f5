"""Two processes under jax.distributed compute what one does."""

import numpy as np
import one_process
import pytest
import several_processes

import jax_flashmla

PROCESSES, LOCAL_DEVICES = 2, 2
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    return several_processes.run(PROCESSES, folder, cpu_devices=LOCAL_DEVICES)


@pytest.mark.parametrize("name", one_process.PROGRAMS)
def test_two_processes_compute_what_one_does(
    shards: list[dict[str, np.ndarray]], name: str
) -> None:
    expected = dict(zip(("out", "lse"), alone(), strict=True))
    places = set()
    for found in shards:
        assert int(found["devices"]) == PROCESSES * LOCAL_DEVICES
        for key, shard in found.items():
            if key.startswith(f"{name}/"):
                _, result, begin, device = key.split("/")
                rows = slice(int(begin), int(begin) + len(shard))
                wanted = np.asarray(expected[result])[rows]
                np.testing.assert_allclose(shard, wanted, atol=TOLERANCE, rtol=TOLERANCE)
                places.add((result, int(begin), device))
    begins = range(4) if name == "requests" else [0] * 4
    assert len(places) == 8
    assert sorted(begin for result, begin, _ in places if result == "out") == sorted(begins)


def alone() -> tuple[np.ndarray, np.ndarray]:
    scale = one_process.shape().softmax_scale
    return jax_flashmla.mla_decode(*one_process.data().arrays(), softmax_scale=scale)
