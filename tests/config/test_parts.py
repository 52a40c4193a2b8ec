"""Rows, columns, elements and the scale of a tensor: each is held to its own limit, and named where it is beyond."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shared_config.errors import UserError
from shared_config.interchange.tensors import TRACE
from shared_config.parity.checks import describe, findings_of
from shared_config.parity.compare import Comparison, Row, compare_traces
from shared_config.parity.numerics import UNIT_ROUNDOFF, rms
from shared_config.parity.parts import PartLimits, part_errors, unpacked, worst_part
from shared_config.parity.recording import delta_and_parts
from shared_config.parity.report.page import report_page
from shared_config.parity.traces import Trace, TraceMeta, read_trace, write_trace

CONFIG = "[model]\ndim = 20\n[optimizer]\nlr = 0.01\n"
ROUTED = "[model]\ndim = 20\nnum_experts = 4\n[optimizer]\nlr = 0.01\n"
INDICES = "routing/layers.0.mlp.router.indices"
DELTA = {"float32": 1e-5, "bfloat16": 1e-2, "fp8": 1e-2, "float64": 1e-12}
"""Relative to the tensor."""


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def moved(name: str, tensor: np.ndarray, delta: float, seed: int = 5) -> tuple[float, np.ndarray]:
    """What a run of moved weights would measure, if it moved every number alike."""
    signs = np.where(values(*tensor.shape, seed=seed) > 0, 1.0, -1.0)
    numbers = delta_and_parts(name, tensor + delta * signs, tensor)
    return float(numbers[0]), numbers[1:]


def traces(
    right: Mapping[str, np.ndarray], wrong: Mapping[str, np.ndarray], dtype: str, config: str = CONFIG, **changes: Any
) -> tuple[Trace, Trace, Trace]:
    """Two traces of a dtype, and the truth: a pair of which only the second may be wrong."""
    found = {name: moved(name, tensor, DELTA[dtype] * rms(tensor)) for name, tensor in right.items()
             if np.issubdtype(tensor.dtype, np.floating)}  # fmt: skip
    deltas = {dtype: {name: delta for name, (delta, _) in found.items()}}
    parts = {dtype: {name: part for name, (_, part) in found.items()}}
    meta = TraceMeta("torch", "cpu", dtype, 3, config)
    truth = dataclasses.replace(meta, dtype="float64", deltas=deltas, parts=parts)
    return Trace(right, meta), Trace(wrong, meta), Trace(right, dataclasses.replace(truth, **changes))


def compared(right: np.ndarray, wrong: np.ndarray, dtype: str, name: str = "forward/x") -> tuple[Row, Comparison]:
    found = compare_traces(*traces({name: right}, {name: wrong}, dtype))
    return found.rows[0], found


K = {
    "row": {"float64": (20, 20), "float32": (20, 20), "bfloat16": (7, 7), "fp8": (7, 7)},
    "column": {"float64": (20, 20), "float32": (20, 20), "bfloat16": (7, 7), "fp8": (7, 7)},
    "element": {"float64": (40, 40), "float32": (40, 40), "bfloat16": (13, 22), "fp8": (13, 22)},
}
PLACES = {
    ("row", 2): (np.s_[17], "row 17"),
    ("row", 3): (np.s_[1, 5], "row 1,5"),
    ("column", 2): (np.s_[:, 3], "column 3"),
    ("column", 3): (np.s_[1, :, 3], "column 1,3"),
    ("element", 1): (np.s_[30], "element 30"),
    ("element", 2): (np.s_[17, 3], "element 17,3"),
    ("element", 3): (np.s_[1, 5, 3], "element 1,5,3"),
}
SHAPES = {1: (400,), 2: (300, 200), 3: (2, 300, 200)}


@pytest.mark.parametrize(("kind", "ndim"), PLACES)
@pytest.mark.parametrize("dtype", DELTA)
@pytest.mark.parametrize("group", ["forward", "decode", "gradient", "updated"])
def test_a_part_is_held_to_its_own_limit(group: str, dtype: str, kind: str, ndim: int) -> None:
    """What is spread over a part is within its limit or beyond, while the whole tensor is far within its own."""
    place, label = PLACES[kind, ndim]
    right = values(*SHAPES[ndim]) * 1e-2
    right.flat[:] += np.sign(right.flat) * 2e-2
    delta = DELTA[dtype] * rms(right)
    limit = K[kind][dtype][group in ("gradient", "updated")] * delta
    if (group, kind) == ("updated", "element"):
        limit *= 4
    for share, ok in ((0.98, True), (1.02, False)):
        wrong = right.copy()
        part = wrong[place]
        signs = np.where(values(*np.shape(part), seed=7) > 0, 1.0, -1.0)
        wrong[place] = part + share * limit * signs
        row, found = compared(right, wrong, dtype, f"{group}/x")
        assert row.ok == ok, row
        assert row.part is not None
        assert (row.part.kind, row.part.label) == (kind, label)
        assert row.share == pytest.approx(share, rel=2e-2)
        assert row.error < row.limit
        if not ok:
            said = describe(row, found)
            assert f"{label} of {group}/x: 1.02 times its limit" in said
            assert row.position is not None
            assert wrong[row.position] != right[row.position]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", ["forward", "gradient"])
def test_a_factor_on_a_whole_tensor_is_found_that_no_row_shows(group: str, dtype: str) -> None:
    right = values(4, 60, 50)
    deltas = moved("x", right, DELTA[dtype] * rms(right))
    rate = DELTA[dtype] / right.size**0.5
    share = max(unpacked(deltas[1], right.shape).scale, rate)
    allowed = {"float32": (24, 24), "bfloat16": (6, 8)}[dtype][group == "gradient"] * share
    allowed = max(allowed, 4 * UNIT_ROUNDOFF[dtype])
    for factor, ok in ((0.98, True), (1.02, False)):
        row, _ = compared(right, right * (1 + factor * allowed), dtype, f"{group}/x")
        assert row.ok == ok
        assert row.part is not None
        assert (row.part.kind, row.part.label) == ("scale", "scale")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=len)
@pytest.mark.parametrize(("limits", "allowed"), [({"absolute": 0.3}, 0.3), ({"relative": 0.05}, 0.1)])
def test_what_is_always_allowed_is_so_to_every_part(
    limits: dict[str, Any], allowed: float, shape: tuple[int, ...]
) -> None:
    """A share of the size of each, or one RMS: of numbers that are 2 or -2 the share is 0.1."""
    reference = np.where(values(*shape) > 0, 2.0, -2.0)
    delta = 1e-9
    deltas = part_errors(np.full(shape, delta), reference)
    for share, ok in ((0.98, True), (1.02, False)):
        error = reference / 2 * allowed * share
        part = worst_part(error, reference, deltas, delta, PartLimits(1.0, 1.0, 1.0, **limits))
        assert (part.share <= 1) == ok
        assert part.share == pytest.approx(share)


def test_a_small_part_has_a_share_of_the_deltas_of_the_tensor() -> None:
    """By chance, a few runs may not move it; and its noise is no wonder where all else is larger."""
    right = values(60, 50)
    right[17] *= 1e-6
    a, b, truth = traces({"forward/x": right}, {"forward/x": right.copy()}, "bfloat16")
    parts = unpacked(truth.meta.parts["bfloat16"]["forward/x"], right.shape)
    parts.rows[17] = 0.0
    meta = dataclasses.replace(truth.meta, parts={"bfloat16": {"forward/x": parts.packed()}})
    delta = DELTA["bfloat16"] * rms(right)
    for share, ok in ((0.9, True), (1.1, False)):
        wrong = right.copy()
        wrong[17] += share * max(7 * 0.25 * delta, 0.25 * 4 * UNIT_ROUNDOFF["bfloat16"] * rms(right))
        found = compare_traces(a, Trace({"forward/x": wrong}, b.meta), Trace(truth.tensors, meta))
        assert found.equal == ok


def test_what_is_0_throughout_a_tensor_that_no_weight_moves_must_be_0() -> None:
    zero = np.zeros((3, 4))
    a, b, truth = traces({"forward/x": zero}, {"forward/x": zero + 1e-30}, "float32")
    assert compare_traces(a, a, truth).equal
    assert not compare_traces(a, b, truth).equal


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", DELTA)
@pytest.mark.parametrize("name", ["gradient/x", "updated/x", "forward/x"])
def test_a_unit_that_is_switched_on_gets_another_row_of_gradients(name: str, dtype: str, activation: str) -> None:
    right = 1e-2 * values(600, 50)
    wrong = right.copy()
    wrong[17] += 30 * DELTA[dtype] * rms(right) * np.sign(wrong[17])
    config = CONFIG.replace("dim = 20", f"dim = 20\nactivation = '{activation}'")
    found = compare_traces(*traces({name: right}, {name: wrong}, dtype, config))
    assert found.equal == (activation == "relu" and dtype != "float64" and name != "forward/x")


def test_rows_after_another_choice_of_experts_are_other_rows() -> None:
    """Before it, they are the same rows; and where the choices are the same, all are."""
    routes = np.arange(96).reshape(48, 2) % 4
    flipped = routes.copy()
    flipped[5] = flipped[5, ::-1]
    names = ("forward/layers.0.attention", "forward/layers.0.mlp", "forward/layers.0", "gradient/layers.0.mlp.gate")
    right: dict[str, np.ndarray] = {names[0]: values(2, 24, 20), INDICES: routes}
    right |= {name: values(48, 20, seed=3) for name in names[1:]}
    for indices, expected in ((flipped, names[:1]), (routes, names)):
        wrong = {name: np.array(tensor) for name, tensor in right.items()}
        wrong[INDICES] = indices
        for name in names:
            wrong[name].reshape(48, 20)[5] += 0.2
        found = compare_traces(*traces(right, wrong, "bfloat16", ROUTED))
        assert tuple(row.name for row in found.failures) == expected


def test_unequal_choices_are_counted_however_far_apart_their_numbers_are() -> None:
    routes = np.tile(np.array([[0, 1]]), (300, 1))
    for far in (2, 200):
        for count, delta, ok in ((8, 2.0, True), (9, 2.0, False), (2, 0.0, True), (3, 0.0, False)):
            other = routes.copy()
            other[:count, 1] = far
            a, b, truth = traces({INDICES: routes}, {INDICES: other}, "bfloat16", ROUTED,
                                 deltas={"bfloat16": {INDICES: delta}})  # fmt: skip
            (row,) = compare_traces(a, b, truth).rows
            assert (row.ok, row.mismatched, row.error) == (ok, count, count)
    a, b, truth = traces({INDICES: routes}, {INDICES: other}, "float32", ROUTED, deltas={"float32": {INDICES: 0.0}})
    assert not compare_traces(a, b, truth).equal


def test_counts_follow_from_the_choices_that_are_unequal() -> None:
    routes, counts = np.tile(np.array([[0, 1]]), (50, 1)), np.array([50, 50, 0, 0])
    other = routes.copy()
    other[0, 1] = 2
    name = "routing/layers.0.expert_counts"
    for moved_counts, ok in ((np.array([50, 49, 1, 0]), True), (np.array([47, 49, 4, 0]), False)):
        sides = {INDICES: routes, name: counts}, {INDICES: other, name: moved_counts}
        assert compare_traces(*traces(*sides, "bfloat16", ROUTED, deltas={"bfloat16": {name: 0.0}})).equal == ok


# Files


def test_parts_are_kept_in_files_and_what_was_written_before_is_read(tmp_path: Path) -> None:
    right = {"forward/x": values(20, 30), "updated/w": values(7), INDICES: np.zeros((10, 2), np.int32)}
    truth = traces(right, right, "bfloat16", ROUTED)[2]
    given = dict(truth.meta.deltas["bfloat16"]) | {INDICES: 0.5, "updated/w": 0.3}
    truth = Trace(right, dataclasses.replace(truth.meta, deltas={"bfloat16": given}))
    file = tmp_path / "truth.safetensors"
    write_trace(file, truth)
    read = read_trace(file)
    assert list(read.tensors) == list(right)
    assert read.meta.deltas == truth.meta.deltas
    for name, part in truth.meta.parts["bfloat16"].items():
        np.testing.assert_array_equal(read.meta.parts["bfloat16"][name], part)
    former = tmp_path / "former.safetensors"
    content = {name: array for name, array in load_file(file).items() if "#" not in name}
    save_file(content, former, metadata={**former_metadata(file), TRACE: "1"})
    read = read_trace(former)
    assert read.meta.parts == {}
    assert read.meta.deltas["bfloat16"] == {
        "forward/x": given["forward/x"],
        "updated/w": 0.03 * 0.01,  # the delta of the parameter says nothing of the step's
        INDICES: 20 * 0.5**2,  # at most so many choices, each at a distance of 1 or more
    }
    assert compare_traces(read, read).equal


def former_metadata(file: Path) -> dict[str, str]:
    """The description of a trace without what the former format lacked."""
    with safe_open(file, "numpy") as opened:
        metadata = dict(opened.metadata())
    content = json.loads(metadata["meta"])
    del content["parts"]
    return {**metadata, "meta": json.dumps(content)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda numbers: numbers[:-1], "parts of forward/x in bfloat16: 51 numbers: must be 52 for shape"),
        (lambda numbers: numbers * 1e3, "must be at most"),
        (lambda numbers: np.where(np.arange(52) == 9, np.nan, numbers), "must be at most"),
        (lambda numbers: np.where(np.arange(52) == 9, -1, numbers), "must be at most"),
        (lambda numbers: np.where(np.arange(52) == 1, np.inf, numbers), "scale = inf: must be finite"),
    ],
)
def test_parts_that_no_rounding_moves_are_refused(change: Any, message: str) -> None:
    right = values(20, 30)
    a, b, truth = traces({"forward/x": right}, {"forward/x": right * (1 + 1e-4)}, "bfloat16")
    damaged = {"bfloat16": {"forward/x": change(truth.meta.parts["bfloat16"]["forward/x"])}}
    with pytest.raises(UserError, match=message):
        compare_traces(a, b, Trace(truth.tensors, dataclasses.replace(truth.meta, parts=damaged)))


def test_the_numbers_of_a_tensor_are_its_rows_and_columns() -> None:
    error, reference = values(2, 5, 3), values(2, 5, 3, seed=2)
    found = part_errors(error, reference)
    np.testing.assert_allclose(found.rows, np.sqrt((error**2).mean(-1)))
    np.testing.assert_allclose(found.columns, np.sqrt((error**2).mean(1)))
    assert found.size == pytest.approx(np.sqrt((reference**2).mean()))
    assert found.scale == pytest.approx(abs((error * reference).sum() / (reference**2).sum()))
    again = unpacked(found.packed(), error.shape)
    np.testing.assert_array_equal(again.packed(), found.packed())
    np.testing.assert_allclose(part_errors(1e200 * error, 1e200 * reference).rows, 1e200 * found.rows)


# What is said


def test_a_row_is_named_wherever_a_verdict_stands() -> None:
    right = values(60, 50)
    wrong = right.copy()
    wrong[17] += 40 * 7 * DELTA["bfloat16"] * rms(right) * np.sign(wrong[17])
    wrong[18] += 20 * 7 * DELTA["bfloat16"] * rms(right) * np.sign(wrong[18])
    row, found = compared(right, wrong, "bfloat16", "gradient/w")
    label = "row 17 of gradient/w"
    (finding,) = findings_of("bfloat16", found)
    assert (finding.worst, finding.error / finding.limit) == ("row 17 of w", pytest.approx(40, rel=1e-3))
    assert f"{label}: 40 times its limit; 2 of 60 rows are beyond theirs" in describe(row, found)
    page = report_page({"bfloat16": found})
    assert "<dt>row 17</dt>" in page
    assert "2 of 60 rows are beyond theirs" in page
    rows: Any = found.to_json()["rows"]
    (content,) = rows
    assert content["part"]["label"] == "row 17"
    assert content["part"]["index"] == [17, None]
    assert content["share"] == content["part"]["share"] == pytest.approx(40, rel=1e-3)
