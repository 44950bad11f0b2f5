from collections.abc import Callable

import pytest

from jax_flashmla.testing import grid
from jax_flashmla.testing.cases import Case

Check = Callable[[Case], None]


def swept(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", grid.swept(group), ids=lambda case: case.name)


@swept("heads")
def test_heads(case: Case, check: Check) -> None:
    check(case)


@swept("queries")
def test_queries(case: Case, check: Check) -> None:
    check(case)


@swept("kv_heads")
def test_kv_heads(case: Case, check: Check) -> None:
    check(case)


@swept("batches")
def test_batches(case: Case, check: Check) -> None:
    check(case)


@swept("lengths")
def test_lengths(case: Case, check: Check) -> None:
    check(case)


@swept("parts")
def test_parts(case: Case, check: Check) -> None:
    check(case)


@swept("models")
def test_models(case: Case, check: Check) -> None:
    check(case)
