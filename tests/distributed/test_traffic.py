"""The cost of a layout, held to what runs: bytes and times of the collectives that PyTorch calls on gloo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings

from shared_config.contract.activations import buffer_bytes
from shared_config.contract.sharding import layout_of
from shared_config.contract.traffic import step_traffic
from tests.distributed.layouts import Case
from tests.distributed.traffic import BUFFERS, Key, count_in_processes

NIGHTLY = settings.get_current_profile_name() == "nightly"
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
NARROW = {"mixed_precision": "bf16"}
NORM_AFTER = {"vocab_size": 40, "norm_placement": "after", "moe_shared_expert_gate": False}


def case(
    model: str, ranks: int, layout: dict[str, int], train: Mapping[str, str] | None = None, exchanges: bool = False
) -> Case:
    """One whose vocabulary is divided evenly, so that all ranks have the same."""
    return Case(model, ranks, layout, {"model": {"vocab_size": 40}, "train": dict(train or {})}, exchanges)


def stages(
    layout: dict[str, int],
    layers: int,
    micro_batches: int,
    train: Mapping[str, str] | None = None,
    evaluated: int = 2,
) -> Case:
    """One of four ranks with a pipeline."""
    model = {"vocab_size": 40, "tie_embeddings": False, "n_layers": layers}
    sections = {
        "model": model,
        "train": {"grad_accum_steps": micro_batches, **(train or {})},
        "eval": {"steps": evaluated},
    }
    return Case("dense", 4, layout, sections)


BY_DAY = (
    case("dense", 4, {}, NARROW),
    case("dense", 4, {"tp": 2, "dp_replicate": 2}),
    case("softmax", 4, {"cp": 2, "tp": 2}, FULL),
    case("sigmoid", 4, {"ep": 2}, {**FULL, **NARROW}),
    stages({"pp": 2}, 2, 3),
)
BY_NIGHT = (
    case("sigmoid", 4, {"ep": 2}, FULL),
    *(case(model, 2, {}) for model in ("dense", "sigmoid", "apart")),
    *(case("dense", 2, {"tp": 2}, train) for train in ({}, FULL, SELECTIVE, NARROW)),
    *(case("apart", 2, {"tp": 2}, train) for train in (FULL, {})),
    *(case("scaled", 2, {"ep": 2}, train, way) for train in ({}, SELECTIVE) for way in (False, True)),
    case("softmax", 2, {"ep": 2}, FULL),
    *(
        Case("softmax", 2, layout, {"model": {**NORM_AFTER, "moe_shared_experts": shared}, "train": FULL})
        for layout in ({"tp": 2}, {"ep": 2})
        for shared in (0, 1)
    ),
    *(case(model, 2, {"cp": 2}, train) for model in ("dense", "sigmoid") for train in ({}, FULL)),
    case("limited", 2, {"tp": 2}, FULL),
    case("dense", 2, {"dp_replicate": 2}),
    case("dense", 4, {"tp": 4}, FULL),
    case("sigmoid", 4, {"ep": 2, "tp": 2}, FULL),
    case("sigmoid", 4, {"ep": 2, "cp": 2}, FULL),
    case("sigmoid", 4, {"ep": 2, "dp_replicate": 2}, NARROW),
    case("sigmoid", 4, {"ep": 4}),
    case("sigmoid", 4, {"dp_replicate": 2}, NARROW),
    stages({"pp": 2}, 4, 2, NARROW),
    stages({"pp": 2, "tp": 2}, 2, 4, FULL),
    stages({"pp": 4}, 4, 5),
    stages({"pp": 4}, 4, 4, evaluated=7),
)
CASES = BY_DAY + BY_NIGHT if NIGHTLY else BY_DAY


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ranks in sorted({case.ranks for case in CASES}):
        cases = [case for case in CASES if case.ranks == ranks]
        found |= count_in_processes(tmp_path_factory.mktemp(f"of_{ranks}"), ranks, cases)
    return found


def modelled(case: Case) -> dict[Key, tuple[int, int]]:
    job = case.job(case.layout)
    times, size = Counter[Key](), Counter[Key]()
    with case.as_asked():
        traffic = step_traffic(job, layout_of(job.distributed, case.ranks))
    for each in traffic:
        times[each.kind, each.axes] += each.count
        size[each.kind, each.axes] += each.bytes
    return {key: (times[key], size[key]) for key in times}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_model_counts_what_pytorch_moves(case: Case, counted: dict[str, Any]) -> None:
    """To the byte, and the call."""
    found = {key: value for key, value in counted[str(case)].items() if key != BUFFERS}
    assert modelled(case) == found


@pytest.mark.parametrize("case", [case for case in CASES if "pp" in case.layout], ids=str)
def test_stages_hold_the_streams_that_the_model_says(case: Case, counted: dict[str, Any]) -> None:
    """Of the stage that holds most, after a step and an evaluation."""
    job = case.job(case.layout)
    _, held = counted[str(case)][BUFFERS]
    assert buffer_bytes(job, layout_of(job.distributed, case.ranks)) == held > 0
