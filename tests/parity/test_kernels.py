"""Which kernels accelerators are given, on a machine without any, and the bugs that this must show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from tests.mutants import BACKENDS, Mutant, in_a_process, mutants_in, not_killed, of_this_run
from tests.mutants_kernels import KERNEL_MUTANTS
from tests.parity.kernel_checks import KERNEL_CHECKS

EACH = [
    pytest.param(backend, check, id=f"{backend}-{check.__name__}")
    for backend, by_component in KERNEL_CHECKS.items()
    for check in dict.fromkeys(itertools.chain(*by_component.values()))
]


@pytest.mark.parametrize(("backend", "check"), EACH)
def test_kernels_are_those_of_the_table(backend: str, check: Callable[[str], None]) -> None:
    check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_choices_are_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    """Every fifth mutant, in JAX every sixth; all of them under HYPOTHESIS_PROFILE=nightly."""
    mutants = of_this_run(mutants_in(KERNEL_MUTANTS, backend), backend, every=6)
    count, left = len(mutants), in_a_process(survey, backend, mutants)
    record_property("figure", f"kernels of {backend}: {count - len(left)}/{count} killed")
    assert not left


def survey(backend: str, mutants: Sequence[Mutant]) -> dict[str, str]:
    return not_killed(mutants, backend, KERNEL_CHECKS[backend])
