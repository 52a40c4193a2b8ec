"""Nothing that has to run in float32 runs in bfloat16, in any module and pass, and in the dtype of its inputs else."""

from __future__ import annotations

import pytest

from tests.mutants import BACKENDS
from tests.parity.precision import idle
from tests.parity.precision_checks import check_decoding, check_forward, check_parts, check_steps
from tests.parity.precision_rules import RULES
from tests.parity.rounding_checks import check_roundings


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_operations_are_those_that_may_be(backend: str) -> None:
    """And every rule that allows some is needed."""
    found = [*check_forward(backend), *check_parts(backend), *check_steps(backend)]
    assert not idle(found, RULES[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_is_as_exact(backend: str) -> None:
    assert check_decoding(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_a_few_roundings_from_float64(backend: str) -> None:
    check_roundings(backend)
