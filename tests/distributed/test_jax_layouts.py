"""JAX in each layout does what it does on one device: the same losses, gradients, steps, counts of experts and biases,
in float64 to rounding. By day four layouts; many more under HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.distributed.jax_layouts import run_devices
from tests.distributed.layouts import Case
from tests.mutants_distributed import CUT_IN_JAX, HELD, JAX_MUTANTS, LORA, MUON, SCHEDULE_FREE

NIGHTLY = settings.get_current_profile_name() == "nightly"
NOISE = {"vlm": {"moma_gumbel_noise": "true"}}
SCANNED = {"train": {"scan_layers": True}}
OVERFLOWING = {"train": {"on_nonfinite": "skip"}, "model": {"embedding_scale": 2.5, "tie_embeddings": False}}
WINDOW = {"model": {"sliding_window": 3}}
OWN_MUON = {**MUON, "train": {**MUON["train"], **SCANNED["train"]}}
BY_DAY = (
    Case("dense", 4, {"tp": 2}, OWN_MUON),
    Case("dense", 2, {"tp": 2}),
    HELD,
    CUT_IN_JAX,
)
BY_NIGHT = (
    Case("limited", 4, {"ep": 2}),
    Case("softmax", 2, {"ep": 2}, OVERFLOWING, overflows=True),
    Case("dense", 2, {}, LORA),
    Case("dense", 4, {"dp_replicate": 2}, {**LORA, **SCANNED}),
    Case("dense", 4, {"cp": 2}, LORA),
    Case("softmax", 4, {"ep": 2}, LORA),
    Case("dense", 4, {"tp": 2}, SCANNED),
    *(Case(model, 4, {"ep": 2}, options) for model in ("sigmoid",) for options in (MUON, SCHEDULE_FREE)),
    Case("dense", 4, {"dp_replicate": 2}, SCANNED),
    Case("sigmoid", 4, {"ep": 2}),
    Case("limited", 2, {"dp_replicate": 2}),
    Case("moma", 2, {}, NOISE),
    *(Case(model, 2, {}) for model in ("dense", "sigmoid", "softmax", "limited", "apart")),
    *(Case(model, 4, {"ep": 4}, SCANNED) for model in ("sigmoid", "softmax")),
    *(Case(model, 2, {}) for model in ("joint_decoder", "cross_attention", "mot")),
    Case("limited", 4, {"ep": 2, "dp_replicate": 2}),
    Case("dense", 8, {"dp_replicate": 2, "tp": 2}, SCANNED),
    Case("dense", 4, {"cp": 2}, {**CUT_IN_JAX.options, **WINDOW}),
    Case("dense", 4, {"cp": 2, "tp": 2}, SCANNED),
    *(Case("mixed", 4, {axis: 2}, SCANNED) for axis in ("tp", "cp")),
    Case("sigmoid", 4, {"cp": 2, "ep": 2}, WINDOW),
    Case("scaled", 4, {"cp": 2, "dp_replicate": 2}),
    *(Case("dense", 2, layout, OVERFLOWING, overflows=True) for layout in ({}, {"tp": 2}, {"cp": 2})),
    Case("limited", 4, {"dp_replicate": 2}, OVERFLOWING, overflows=True),
)
CASES = (*BY_DAY, *BY_NIGHT) if NIGHTLY else BY_DAY
PLANTED = JAX_MUTANTS if NIGHTLY else JAX_MUTANTS[::10]
MUTANTS = [(bug.mutant, bug.case) for bug in PLANTED if isinstance(bug.case, Case)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What differs in every case and under every mutant."""
    return run_devices(tmp_path_factory.mktemp("devices"), 8 if NIGHTLY else 4, CASES, MUTANTS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_is_one_device(case: Case, found: dict[str, list[str]]) -> None:
    assert found[str(case)] == []


@pytest.mark.parametrize("mutant", [str(mutant) for mutant, _ in MUTANTS])
def test_a_bug_of_a_layout_is_seen(mutant: str, found: dict[str, list[str]]) -> None:
    """A tenth of them, all under HYPOTHESIS_PROFILE=nightly."""
    assert found[mutant] != []
