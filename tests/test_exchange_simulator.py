"""The direct exchange's protocol: right for any speed of devices, any groups, one round and two."""

import pytest
from exchange_simulator import Exchange, ProtocolError, run
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICES = 4


@st.composite
def programs(draw: st.DrawFn) -> list[Exchange]:
    """Exchanges of changing groups and sizes, as of several programs one after the other."""
    count = draw(st.integers(2, 7))
    made = []
    for _ in range(count):
        group = draw(st.permutations(range(DEVICES)))[: draw(st.integers(2, DEVICES))]
        made.append(Exchange(tuple(group), draw(st.integers(1, 5)), draw(st.booleans())))
    return made


@settings(max_examples=200, deadline=None, derandomize=True)
@given(exchanges=programs(), seed=st.integers(0, 2**31))
def test_every_merge_is_of_its_exchange(exchanges: list[Exchange], seed: int) -> None:
    run(exchanges, DEVICES, seed=seed)


@pytest.mark.parametrize("two_rounds", [False, True])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_chain_of_exchanges(n: int, two_rounds: bool) -> None:
    for seed in range(5):
        run([Exchange(tuple(range(n)), 3, two_rounds)] * 6, n, seed=seed)


def broken(exchanges: list[Exchange], devices: int, **options: int) -> bool:
    try:
        run(exchanges, devices, **options)
    except ProtocolError:
        return True
    return False


def test_one_set_of_slots_would_not_do() -> None:
    chain = [Exchange((0, 1), 2, two_rounds=False)] * 6
    assert any(broken(chain, 2, turns=1, seed=seed) for seed in range(30))


def test_an_exchange_that_one_device_leaves_out_is_seen() -> None:
    together = Exchange((0, 1), 1, two_rounds=False)
    alone = Exchange((0, 2), 1, two_rounds=False)
    assert broken([together, alone], 2)  # device 2 does not exist
