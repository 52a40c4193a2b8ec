"""Correct pairs are the same, bugs planted in their traces are found: of every architecture, in float32 and bfloat16.

``HYPOTHESIS_PROFILE=nightly`` draws 300 pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from kempnerforge_torch.trace import record
from shared_config.contract.vision import job_table
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from shared_config.parity.checks import describe
from shared_config.parity.compare import Row, compare_traces
from shared_config.parity.traces import Trace
from shared_config.parity.validation import validation_weights
from tests.parity.false_alarms import DTYPES, PRESETS, Seen, compare_pairs, drawn_job

NIGHTLY = settings.get_current_profile_name() == "nightly"
JOBS = range(150) if NIGHTLY else (6,)
"""Of `drawn_job`: each is a pair in both dtypes."""
CONFIG = load_config(
    "debug",
    ("--model.dim=64", "--model.n_layers=2", "--model.ffn_hidden_dim=96", "--optimizer.lr=3e-4"),
)
LOGITS, EMBEDDING = "forward/output_head", "gradient/token_embedding.embedding.weight"
QUERIES, NORM = "gradient/layers.1.attention.q_proj.weight", "gradient/layers.1.mlp_norm.weight"
ATTENTION = "forward/layers.0.attention"

ASKED = ["forward/*", "gradient/*", "updated/*"]

Change = Callable[[np.ndarray], Any]


@pytest.mark.parametrize("seed", JOBS)
def test_a_correct_pair_is_no_false_alarm(seed: int) -> None:
    seen = Seen()
    compare_pairs(seed, seen)
    assert seen.pairs == len(DTYPES)
    assert seen.alarms == []
    assert {kind for _, _, kind in seen.shares} > {"whole"}


def test_every_architecture_is_drawn() -> None:
    jobs = [drawn_job(seed) for seed in range(len(PRESETS))]
    archs = {(job.model.is_moe, None if job.vlm is None else job.vlm.arch) for job in jobs}
    assert len(archs) == len(PRESETS)
    assert drawn_job(0) == drawn_job(0) != drawn_job(len(PRESETS))


@pytest.fixture(scope="module")
def truth() -> Trace:
    return record(CONFIG, device="cpu", only=ASKED)


@pytest.fixture(scope="module", params=DTYPES)
def right(request: pytest.FixtureRequest) -> Trace:
    return record(CONFIG, dtype=request.param, device="cpu", deltas=False, only=ASKED)


def failures(right: Trace, truth: Trace, changed: dict[str, np.ndarray]) -> list[Row]:
    """What differs where some tensors are others."""
    stored = {name: array.astype(right.tensors[name].dtype) for name, array in changed.items()}
    found = compare_traces(right, Trace({**right.tensors, **stored}, right.meta), truth)
    assert all(row.name in describe(row, found) for row in found.failures)
    return list(found.failures)


def scaled(factor: float) -> Change:
    return lambda array: array * factor


def at(place: Any, factor: float = 0.0) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] *= factor
        return array

    return change


def embedding_row(array: np.ndarray) -> np.ndarray:
    """The median of the rows that have a gradient gets none."""
    sizes = np.linalg.norm(array, axis=1)
    order = np.argsort(sizes)
    array[order[np.count_nonzero(sizes == 0) + np.count_nonzero(sizes) // 2]] = 0.0
    return array


def largest_element(array: np.ndarray) -> np.ndarray:
    array.flat[np.argmax(np.abs(array))] = 0.0
    return array


def swapped_rows(array: np.ndarray) -> np.ndarray:
    array[[3, 4]] = array[[4, 3]]
    return array


BUGS: dict[str, tuple[str, Change, str]] = {
    "one logit of every token is 0": (LOGITS, at(np.s_[..., 7]), "column"),
    "one logit is 0": (LOGITS, largest_element, "element"),
    "all logits are 3 % too large": (LOGITS, scaled(1.03), "scale"),
    "all logits are 3 % too small": (LOGITS, scaled(0.97), "scale"),
    "the logits of one token are 20 % too large": (LOGITS, at(np.s_[1, 3], 1.2), "row"),
    "the attention of one position is 0": (ATTENTION, at(np.s_[0, -1]), "row"),
    "one feature of the attention is 20 % too small": (ATTENTION, at(np.s_[..., 5], 0.8), "column"),
    "one row of the embedding has no gradient": (EMBEDDING, embedding_row, "row"),
    "one query has no gradient": (QUERIES, at(np.s_[9]), "row"),
    "one input of the queries has no gradient": (QUERIES, at(np.s_[:, 9]), "column"),
    "two rows of a gradient are swapped": (QUERIES, swapped_rows, "row"),
    "a gradient is a tenth too large": (QUERIES, scaled(1.1), "scale"),
    "an element of a gradient has the wrong sign": (
        NORM, lambda array: at(int(np.argsort(np.abs(array))[array.size // 2]), -1.0)(array), "element"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_a_part_of_a_tensor_is_found(bug: str, right: Trace, truth: Trace) -> None:
    name, change, kind = BUGS[bug]
    assert failures(right, truth, {}) == []
    (row,) = failures(right, truth, {name: change(np.asarray(right.tensors[name]).astype(np.float64))})
    assert row.name == name
    assert row.part is not None
    assert row.part.kind == kind


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 2.0, 0.9])
def test_a_wrong_step_is_found(factor: float, right: Trace, truth: Trace) -> None:
    """None at all, one backwards, half of it, twice as much, and a learning rate that is a tenth too small."""
    weights = validation_weights(job_table(CONFIG, tower_of(CONFIG)), seed=0)
    names = {f"updated/{name}": values.astype(np.float64) for name, values in weights.items()}
    steps = {name: np.asarray(right.tensors[name]) - before for name, before in names.items()}
    changed = {name: before + factor * steps[name] for name, before in names.items()}
    found = {row.name for row in failures(right, truth, changed)}
    missed = set(names) - found
    assert len(missed) < 0.1 * len(names) if factor == 0.9 else not missed


def test_deltas_of_updates_are_those_of_the_step(truth: Trace) -> None:
    """Rounding the weights moves the step by a share of the learning rate, whatever it does to the weights."""
    weights = validation_weights(job_table(CONFIG, tower_of(CONFIG)), seed=0)
    for name, values in weights.items():
        step = np.asarray(truth.tensors[f"updated/{name}"]) - values
        size, delta = np.sqrt(np.mean(step**2)), truth.meta.deltas["bfloat16"][f"updated/{name}"]
        assert 0 < delta < 0.2 * size < 0.2 * 3 * CONFIG.optimizer.lr, name


def test_without_parts_whole_tensors_are_judged(right: Trace, truth: Trace) -> None:
    """As in a trace that was written before there were any."""
    bare = Trace(truth.tensors, dataclasses.replace(truth.meta, parts={}))
    assert failures(right, bare, {}) == []
    zeros = np.zeros(np.shape(right.tensors[QUERIES]))
    assert [row.name for row in failures(right, bare, {QUERIES: zeros})] == [QUERIES]
