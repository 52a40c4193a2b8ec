"""Processes of JAX that train together do what one device does: the same losses, steps, counts and evaluation, in
float64 to rounding; and they write and read the parts that their devices hold. By day one layout; more, and all bugs,
under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.distributed.jax_processes import CHECKS, Check, run_jax_processes
from tests.distributed.layouts import Case
from tests.mutants_distributed import PROCESS_MUTANTS

NIGHTLY = settings.get_current_profile_name() == "nightly"
NOISE = {"vlm": {"moma_gumbel_noise": "true"}}
ONE_LAYER = {"model": {"n_layers": 1}}
BY_DAY: dict[int, tuple[Check, ...]] = {2: (*CHECKS, Case("sigmoid", 4, {"ep": 2}, ONE_LAYER))}
BY_NIGHT: dict[int, tuple[Check, ...]] = {
    2: (
        *BY_DAY[2],
        Case("sigmoid", 4, {"ep": 2}),
        *(Case("dense", 4, layout) for layout in ({}, {"tp": 2}, {"tp": 4}, {"dp_replicate": 2})),
        Case("dense", 4, {"cp": 4}, {"train": {"seq_len": 12}}),
        Case("moma", 4, {}, NOISE),
        Case("mot", 4, {}),
    ),
    4: (
        *CHECKS,
        Case("dense", 8, {}, {"train": {"scan_layers": True}}),
        Case("dense", 8, {"tp": 2, "dp_replicate": 2}),
        Case("limited", 8, {"ep": 4}),
    ),
}
CASES = BY_NIGHT if NIGHTLY else BY_DAY
MUTANTS = [bug for bug in PROCESS_MUTANTS if NIGHTLY or not isinstance(bug.case, Case)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[str]]:
    """What differs in every check, by the number of devices of a process, and under every mutant (of 2)."""
    every: dict[tuple[int, str], list[str]] = {}
    for devices, checks in CASES.items():
        folder: Path = tmp_path_factory.mktemp(f"of_{devices}")
        lines = run_jax_processes(folder, devices, checks, MUTANTS if devices == 2 else ())
        every |= {(devices, name): said for name, said in lines.items()}
    return every


@pytest.mark.parametrize(
    ("devices", "check"), [(devices, str(check)) for devices, checks in CASES.items() for check in checks]
)
def test_processes_are_one_device(devices: int, check: str, found: dict[tuple[int, str], list[str]]) -> None:
    assert found[devices, check] == []


@pytest.mark.parametrize("mutant", [str(bug.mutant) for bug in MUTANTS])
def test_a_bug_of_processes_is_seen(mutant: str, found: dict[tuple[int, str], list[str]]) -> None:
    """By day those that need no compilation."""
    assert found[2, mutant] != []
