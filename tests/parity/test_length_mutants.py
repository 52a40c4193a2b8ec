"""Every bug that begins beyond some length is caught, in either backend."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest

from tests.mutants import BACKENDS
from tests.mutants_lengths import LENGTH_MUTANTS
from tests.parity.length_checks import LENGTH_CHECKS
from tests.parity.test_mutants import is_killed


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mutant_is_killed(backend: str, record_property: Callable[[str, object], None]) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        survivors = pool.submit(surviving, backend).result()
    record_property("figure", f"mutants of lengths, {backend}: {len(survivors)} of {len(LENGTH_MUTANTS)} survive")
    assert not survivors


def surviving(backend: str) -> list[str]:
    """To be called in a process of its own, as `test_mutants.survey`; `test_lengths` has the checks without a bug."""
    mutants = [mutant for mutant in LENGTH_MUTANTS if getattr(mutant, backend) is not None]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return [str(m) for m in mutants if not is_killed(m, backend, LENGTH_CHECKS[m.component])]
