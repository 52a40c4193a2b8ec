"""Drawn layouts of drawn models do what one device does, or are refused by a line that names a field and its value. By
day a few in PyTorch; more, and in JAX, under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shared_config.contract.sharding import MESH_AXES, layout_of, refusals, unsupported
from shared_config.errors import ConfigError
from shared_config.interchange.vision import tower_of
from tests.distributed.drawn import cases
from tests.distributed.jax_layouts import run_devices
from tests.distributed.layouts import Case, run_processes

NIGHTLY = settings.get_current_profile_name() == "nightly"
ROUNDS, OF_A_ROUND = (8, 12) if NIGHTLY else (1, 4)
REFUSAL = re.compile(r"(distributed|model|train|width of an expert|lora)\S* = .+: .*\S")
drawing = settings(  # a round starts processes: what fails is not run again, smaller
    max_examples=ROUNDS,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def reasons(case: Case, backend: str) -> list[str]:
    """Why a backend has to refuse the layout."""
    job = case.job(case.layout)
    try:
        layout_of(job.distributed, case.ranks)
    except ConfigError as error:
        return list(error.problems)
    return [*refusals(job), *unsupported(job, backend, tower_of(job))]


def several(devices: int, axes: tuple[str, ...] = MESH_AXES) -> st.SearchStrategy[list[Case]]:
    return st.lists(cases(devices, axes), min_size=OF_A_ROUND, max_size=OF_A_ROUND, unique_by=str)


@pytest.mark.parametrize("ranks", [2, 4] if NIGHTLY else [2])
def test_drawn_layouts_of_torch_are_one_device_or_refused(ranks: int) -> None:
    @drawing
    @given(several(ranks))
    def check(drawn: Sequence[Case]) -> None:
        refused = [case for case in drawn if reasons(case, "torch")]
        able = [case for case in drawn if case not in refused]
        with TemporaryDirectory() as folder:
            found = run_processes(Path(folder), ranks, able, refused=refused)
        assert {str(case): found[str(case)] for case in able} == {str(case): [] for case in able}
        for case in refused:
            assert [REFUSAL.search(line) is not None for line in found[str(case)]] == [True] * len(found[str(case)])
            assert len(found[str(case)]) == ranks * len(reasons(case, "torch")), case

    check()


@pytest.mark.skipif(not NIGHTLY, reason="compiles each: HYPOTHESIS_PROFILE=nightly")
@drawing
@given(several(4, tuple(axis for axis in MESH_AXES if axis != "pp")))
def test_drawn_layouts_of_jax_are_one_device(drawn: Sequence[Case]) -> None:
    able = [case for case in drawn if not reasons(case, "jax")]
    with TemporaryDirectory() as folder:
        assert run_devices(Path(folder), 4, able) == {str(case): [] for case in able}
