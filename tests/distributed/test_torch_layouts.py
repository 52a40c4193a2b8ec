"""PyTorch in each layout does what it does on one device: the same losses, gradients, steps, counts of experts and
biases, in float64 to rounding; replicas have the same bits.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import Case, run_processes
from tests.mutants_distributed import DISTRIBUTED_MUTANTS

NOISE = {"vlm": {"moma_gumbel_noise": "true"}}
CASES = {
    2: (
        *(Case(model, 2, {}) for model in ("dense", "sigmoid", "softmax", "limited", "apart")),
        Case("moma", 2, {}, NOISE),
    ),
    4: (Case("dense", 4, {}), Case("sigmoid", 4, {"dp_replicate": 2})),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What differs in every case and under every mutant."""
    two = run_processes(tmp_path_factory.mktemp("two"), 2, CASES[2], DISTRIBUTED_MUTANTS)
    return two | run_processes(tmp_path_factory.mktemp("four"), 4, CASES[4])


@pytest.mark.parametrize("case", [*CASES[2], *CASES[4]], ids=str)
def test_a_layout_is_one_device(case: Case, found: dict[str, list[str]]) -> None:
    assert found[str(case)] == []


@pytest.mark.parametrize("mutant", [str(mutant) for mutant, _ in DISTRIBUTED_MUTANTS])
def test_a_bug_of_a_layout_is_seen(mutant: str, found: dict[str, list[str]]) -> None:
    assert found[mutant] != []
