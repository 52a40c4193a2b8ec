"""Both backends with their switches crossed pairwise; `state_checks` says what is checked."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

from tests.covering import covered, covering, pairs
from tests.parity import state_checks as checks

on_both = pytest.mark.parametrize("backend", ["torch", "jax"])


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def test_every_pair_of_values_occurs() -> None:
    possible = [pair for pair in pairs(checks.SWITCHES) if checks.goes_together(dict(pair))]
    missing = [pair for pair in possible if not any(covered(row, [pair]) for row in checks.STATES)]
    assert not missing
    assert all(checks.goes_together(row) for row in checks.STATES)
    assert len(checks.STATES) < 40


def test_a_pair_that_no_row_can_have_is_left_out() -> None:
    rows = covering({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, lambda row: sum(row.values()) < 2)
    assert sorted(tuple(row.values()) for row in rows) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]


@on_both
@pytest.mark.parametrize("place", range(len(checks.STATES)))
def test_forward_and_gradients(backend: str, place: int) -> None:
    checks.check_state(backend, checks.STATES[place])
