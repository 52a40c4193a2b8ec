"""Which kernels accelerators are given, on a machine without any, and the bugs that this must show."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.mutants import BACKENDS, Mutant, planted
from tests.mutants_kernels import KERNEL_MUTANTS
from tests.parity.kernel_checks import KERNEL_CHECKS

EACH = [
    pytest.param(backend, check, id=f"{backend}-{check.__name__}")
    for backend, by_component in KERNEL_CHECKS.items()
    for checks in by_component.values()
    for check in checks
]


@pytest.mark.parametrize(("backend", "check"), EACH)
def test_kernels_are_those_of_the_table(backend: str, check: Callable[[str], None]) -> None:
    check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_choices_are_found(backend: str, record_property: Callable[[str, object], None]) -> None:
    mutants = [mutant for mutant in KERNEL_MUTANTS if getattr(mutant, backend) is not None]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        survivors = pool.submit(surviving, backend).result()
    record_property("figure", f"kernels of {backend}: {len(mutants) - len(survivors)}/{len(mutants)} killed")
    assert not survivors


def surviving(backend: str) -> list[str]:
    """To be called in a process of its own: operators that a mutated module registers replace the real ones."""
    mutants = [mutant for mutant in KERNEL_MUTANTS if getattr(mutant, backend) is not None]
    return [str(mutant) for mutant in mutants if not is_found(mutant, backend)]


def is_found(mutant: Mutant, backend: str) -> bool:
    """Whether a check says so, by its assertion."""
    with planted(mutant, backend):
        for check in KERNEL_CHECKS[backend][mutant.component]:
            try:
                check(backend)
            except AssertionError:
                return True
            except Exception as error:
                raise RuntimeError(f"{mutant}: crashes, and shows nothing") from error
    return False
