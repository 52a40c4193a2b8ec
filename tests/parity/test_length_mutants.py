"""Every bug that begins beyond some length, or shows in a combination of switches only, is caught in either backend."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest
from hypothesis import settings

from tests.mutants import BACKENDS, in_a_process, not_killed
from tests.mutants_lengths import LENGTH_MUTANTS
from tests.mutants_states import STATE_MUTANTS
from tests.parity.length_checks import LENGTH_CHECKS
from tests.parity.state_checks import STATE_CHECKS

TOPICS = {"lengths": (LENGTH_MUTANTS, LENGTH_CHECKS), "states": (STATE_MUTANTS, STATE_CHECKS)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topic", TOPICS)
def test_every_mutant_is_killed(topic: str, backend: str, record_property: Callable[[str, object], None]) -> None:
    if backend == "jax" and settings.get_current_profile_name() != "nightly":
        pytest.skip("half a minute of compilation: HYPOTHESIS_PROFILE=nightly")
    left = in_a_process(survey, topic, backend)
    record_property("figure", f"mutants of {topic}, {backend}: {left or 'none'} survive")
    assert not left


def survey(topic: str, backend: str) -> dict[str, str]:
    """`test_lengths` and `test_states` have the checks without a bug."""
    mutants, checks = TOPICS[topic]
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return not_killed(mutants, backend, checks)
