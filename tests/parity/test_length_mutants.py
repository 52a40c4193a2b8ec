"""Every bug that begins beyond some length, or shows in a combination of switches only, is caught in either backend."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest
from hypothesis import settings

from tests.mutants import BACKENDS
from tests.mutants_lengths import LENGTH_MUTANTS
from tests.mutants_states import STATE_MUTANTS
from tests.parity.length_checks import LENGTH_CHECKS
from tests.parity.state_checks import STATE_CHECKS
from tests.parity.test_mutants import is_killed

TOPICS = {"lengths": (LENGTH_MUTANTS, LENGTH_CHECKS), "states": (STATE_MUTANTS, STATE_CHECKS)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topic", TOPICS)
def test_every_mutant_is_killed(topic: str, backend: str, record_property: Callable[[str, object], None]) -> None:
    if backend == "jax" and settings.get_current_profile_name() != "nightly":
        pytest.skip("half a minute of compilation: HYPOTHESIS_PROFILE=nightly")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        survivors = pool.submit(surviving, topic, backend).result()
    record_property("figure", f"mutants of {topic}, {backend}: {survivors or 'none'} survive")
    assert not survivors


def surviving(topic: str, backend: str) -> list[str]:
    """To be called in a process of its own, as `test_mutants.survey`; `test_lengths` and `test_states` have the checks
    without a bug.
    """
    mutants, checks = TOPICS[topic]
    there = [mutant for mutant in mutants if getattr(mutant, backend) is not None]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return [str(mutant) for mutant in there if not is_killed(mutant, backend, checks[mutant.component])]
