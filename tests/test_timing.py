"""Time of a step, held against a host whose steps sleep."""

import time

import jax.numpy as jnp
import pytest

from jax_flashmla import _timing

pytestmark = pytest.mark.usefixtures("sleeping_clock")


def test_cost_of_starting_and_awaiting_a_run_is_no_part_of_a_step() -> None:
    def run(steps: int) -> None:
        time.sleep(0.05 + 0.01 * steps)

    assert _timing.further_step(run, 5) == pytest.approx(0.01)


def test_step_below_the_noise_still_has_a_time() -> None:
    delays = iter([0.02, 0.01])
    assert _timing.further_step(lambda steps: time.sleep(next(delays)), 1) > 0  # noqa: ARG005


def test_state_passes_through_every_step() -> None:
    def step(state: tuple[int, object]) -> tuple[int, object]:
        time.sleep(0.001)
        return state[0] + 1, state[1]

    start = (0, jnp.zeros(3))
    seconds, (count, _) = _timing.time_steps(step, start, repeats=3, seconds=0.005)
    assert (seconds.low, seconds.median, seconds.high) == pytest.approx((0.001,) * 3)
    assert count > 2 + 3 * 2
