"""Comparing traces: where limits lie, what is found first, what is refused; correct pairs raise no alarm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given

from shared_config.contract.parameters import parameter_table
from shared_config.errors import UserError
from shared_config.parity.align import execution_order
from shared_config.parity.checks import describe
from shared_config.parity.compare import TOLERANCES, Comparison, compare_traces
from shared_config.parity.measure import heatmap
from shared_config.parity.numerics import UNIT_ROUNDOFF, perturbation_delta, rms
from shared_config.parity.traces import Trace, TraceMeta
from shared_config.parity.validation import validation_tokens, validation_weights
from shared_config.schema.base import execution_names
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from tests.oracle import attention as oracle_attention
from tests.oracle import linear as oracle_linear
from tests.oracle import mlp as oracle_mlp
from tests.oracle import transformer as oracle_transformer
from tests.oracle.transformer import transformer, transformer_backward

DELTA = 1e-3
NAMES = ("forward/layers.0", "routing/layers.0.aux_loss", "loss", "gradient/w", "updated/w", "decode/1,1", "losses")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "fp8": BFLOAT16,
}


def origin(**fields: Any) -> TraceMeta:
    given: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float64", "seed": 3}
    return TraceMeta(**{**given, "config": "[model]\ndim = 20\n[optimizer]\nlr = 0.01\neps = 1e-8\n", **fields})


def trace(tensors: Mapping[str, Any], **fields: Any) -> Trace:
    return Trace(dict(tensors), origin(**fields))


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def shifted(array: np.ndarray, error: float, seed: int = 1) -> np.ndarray:
    """The array with a difference of exactly this RMS, to rounding."""
    direction = np.random.default_rng(seed).standard_normal(array.shape)
    return array + direction * (error / rms(direction))


def compared(a: Any, b: Any, truth: Any = None, name: str = "forward/x", dtype: str = "float32", delta: float = DELTA):
    """The row of one tensor."""
    deltas = {dtype: {name: delta}}
    against = None if truth is None else trace({name: truth}, deltas=deltas)
    found = compare_traces(trace({name: a}, dtype=dtype, deltas=deltas), trace({name: b}, dtype=dtype), against)
    (row,) = found.rows
    assert found.equal == row.ok
    return row


def test_a_trace_equals_itself():
    same = trace({name: values(3, 4) for name in NAMES} | {"routing/i": np.arange(6)})
    found = compare_traces(same, same)
    assert found.equal
    assert {row.status for row in found.rows} == {"equal"}
    assert (found.first_forward, found.first_backward, found.failures) == (None, None, ())


SMALL = {"float64": 1e-12, "float32": 1e-3, "bfloat16": 0.02, "fp8": 0.02}
"""Deltas relative to a tensor that are far above all other limits, and no more than rounding can do."""

LIMITS = [
    ("float32", "forward", 10),
    ("float32", "loss", 10),
    ("float32", "decode", 10),
    ("float32", "routing", 10),
    ("float32", "gradient", 20),
    ("float32", "updated", 20),
    ("bfloat16", "forward", 4),
    ("bfloat16", "gradient", 10),
    ("bfloat16", "updated", 10),
    ("fp8", "forward", 4),
    ("fp8", "gradient", 10),
    ("float64", "forward", 10),
    ("float64", "gradient", 20),
]


@pytest.mark.parametrize(("dtype", "group", "K"), LIMITS)
@pytest.mark.parametrize("against_truth", [False, True])
def test_the_limit_is_k_deltas(dtype, group, K, against_truth):
    a, name = values(6, 7), group if group == "loss" else f"{group}/x"
    delta = SMALL[dtype] * (0.01 if group == "updated" else rms(a))  # a step is as large as the learning rate
    for factor, status in ((0.99, "within"), (1.01, "differs")):
        b = shifted(a, factor * K * delta)
        row = compared(a, b, a if against_truth else None, name, dtype, delta)
        assert row.status == status
        assert row.multiple == pytest.approx(factor * K, rel=1e-3)
        assert row.share == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize(("name", "relative"), [("forward/x", 1e-12), ("gradient/x", 1e-12), ("losses", 1e-9)])
def test_float64_needs_no_delta(name, relative):
    a = values(6, 7)
    for factor, status in ((0.9, "within"), (1.1, "differs")):
        b = shifted(a, factor * relative * rms(a))
        found = compare_traces(trace({name: a}), trace({name: b}))
        assert found.rows[0].status == status
        assert found.rows[0].relative == pytest.approx(factor * relative, rel=1e-3)


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-5), ("bfloat16", 1e-2), ("fp8", 2e-2)])
def test_losses_of_a_run_need_no_delta(dtype, relative):
    a = 3 + values(50)
    for factor, status in ((0.9, "within"), (1.1, "differs")):
        b = shifted(a, factor * relative * rms(a))
        assert compare_traces(trace({"losses": a}, dtype=dtype), trace({"losses": b}, dtype=dtype)).rows[0].status == (
            status if factor * relative > 4 * UNIT_ROUNDOFF[dtype] else "within"
        )


@pytest.mark.parametrize("name", ["loss", "routing/layers.0.z_loss"])
def test_means_of_float32_may_round_by_themselves(name):
    a = np.asarray(3.7)
    assert compared(a, a * (1 + 0.9e-6), name=name, delta=0.0).status == "within"
    assert compared(a, a * (1 + 1.1e-6), name=name, delta=0.0).status == "differs"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_without_a_delta_effect_only_storage_may_round(dtype):
    a = values(6, 7)
    floor = max(4 * UNIT_ROUNDOFF[dtype], 1e-12 if dtype == "float64" else 0)
    assert compared(a, shifted(a, 0.99 * floor * rms(a)), dtype=dtype, delta=0.0).status == "within"
    row = compared(a, shifted(a, 1.01 * floor * rms(a)), dtype=dtype, delta=0.0)
    assert row.status == "differs"
    assert row.multiple == np.inf


def test_a_truth_of_zero_must_be_met_exactly():
    zero = np.zeros((3, 4))
    assert compared(zero, zero, zero, delta=0.0).status == "equal"
    assert compared(zero, zero + 1e-30, zero, delta=0.0).status == "differs"
    assert compared(zero, zero + 1e-30, zero, name="gradient/x", delta=0.0).status == "differs"  # none is larger


def test_the_side_that_is_further_off_is_shown():
    truth = values(4, 5)
    a, b = truth.copy(), truth.copy()
    a[1, 2] += 1e-3
    b[3, 4] -= 2.0
    row = compared(a, b, truth)
    assert (row.worse, row.against, row.status, row.position) == ("b", "truth", "differs", (3, 4))
    assert (row.value_a, row.value_b, row.value_truth) == (truth[3, 4], truth[3, 4] - 2.0, truth[3, 4])
    row = compared(b, a, truth)
    assert (row.worse, row.position) == ("a", (3, 4))


def test_two_that_agree_with_each_other_may_both_be_wrong():
    truth = values(4, 5)
    assert compared(truth + 1, truth + 1).status == "equal"
    assert compared(truth + 1, truth + 1, truth).status == "differs"


def test_each_side_is_held_to_its_own_precision():
    truth = values(40, 5)
    deltas = {"float32": {"forward/x": 1e-7}, "bfloat16": {"forward/x": 1e-2}}
    rounded, exact = shifted(truth, 3e-2), shifted(truth, 3e-7)
    reference = trace({"forward/x": truth}, deltas=deltas)

    def status(a: np.ndarray, b: np.ndarray, against: Trace | None) -> str:
        sides = trace({"forward/x": a}, dtype="bfloat16", deltas=deltas), trace({"forward/x": b}, dtype="float32")
        return compare_traces(*sides, against).rows[0].status

    assert status(rounded, exact, reference) == "within"
    assert status(exact, rounded, reference) == "differs"
    assert status(rounded, exact, None) == "within"  # among themselves, the coarser counts


def test_nan_is_compared_by_place_before_anything_else():
    a = values(4, 5)
    a[1, 2] = np.nan
    a[3, 3] = -np.inf
    assert compared(a, a.copy()).mismatched == compared(a, a + 1e-4).mismatched == 0
    for place, value in (((0, 1), np.nan), ((1, 2), 0.0), ((3, 3), np.inf)):
        b = a.copy()
        b[place] = value
        row = compared(a, b)
        assert (row.status, row.mismatched, row.position, row.error) == ("differs", 1, place, np.inf)


@pytest.mark.parametrize("which", ["a", "b", "both", "neither"])
@pytest.mark.parametrize("against_truth", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_not_finite_in_both_is_a_finding(dtype, bad, against_truth, which):
    """Whatever kind it is, however it is kept, and whatever the truth says; a part of a tensor as well as all of it."""
    for places in (np.s_[:], np.s_[1, 2:4]):
        a = values(4, 5).astype(DTYPES[dtype])
        truth = a.astype(np.float64)
        a[places] = bad
        count = int(np.count_nonzero(~np.isfinite(a.astype(np.float64))))
        plain = trace({"forward/x": a}, dtype=dtype)
        side_a, side_b = (plain.summarized(0) if which in (side, "both") else plain for side in "ab")
        against = trace({"forward/x": truth}, deltas={dtype: {"forward/x": 0.0}}) if against_truth else None
        found = compare_traces(side_a, side_b, against)
        (row,) = found.rows
        assert (row.status, row.ok, row.nonfinite) == ("not finite in both", False, count)
        assert not found.equal
        assert f"forward/x: not finite in both; at {row.position}" in describe(row, found) or which != "neither"
        assert f"{count} places are not finite in both" in describe(row, found)


def test_what_is_finite_may_differ_beside_what_is_not():
    a = values(4, 5)
    a[1, 2] = np.nan
    row = compared(a, a + 1.0)
    assert (row.status, row.nonfinite, row.mismatched) == ("differs", 1, 0)


def test_a_nan_is_a_difference_even_without_deltas():
    a, b = values(3), values(3)
    b[1] = np.nan
    found = compare_traces(trace({"forward/x": a}, dtype="float32"), trace({"forward/x": b}, dtype="float32"))
    assert [row.status for row in found.rows] == ["differs"]


def test_integers_are_exact():
    a = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert compared(a, a.astype(np.int64)).status == "equal"
    b = a.copy()
    b[1, 3] += 1
    b[2, 0] += 1
    row = compared(a, b)
    assert (row.status, row.mismatched, row.position) == ("differs", 2, (1, 3))
    assert (row.value_a, row.value_b) == (7, 8)
    assert compared(a > 3, a > 4).status == "differs"


def test_integers_may_differ_by_as_much_as_rounding_the_weights_changes():
    route = np.array([[0, 2], [1, 0]])
    flipped = np.array([[2, 0], [1, 0]])
    name = "routing/layers.0.mlp.router.indices"
    row = compared(route, flipped, name=name, delta=0.2)
    assert (row.status, row.mismatched, row.error, row.limit) == ("within", 2, 2, 2)
    assert compared(route, flipped, name=name, delta=0.1).status == "differs"
    assert compared(route, flipped, name=name, delta=0.0).status == "differs"
    assert compared(route, route[:, ::-1], name=name, delta=0.2).status == "differs"  # no rounding moves them all


def test_a_tensor_is_measured_by_what_it_is_held_to():
    x = values(50)
    assert compared(3 * x, 3 * x, x).scale == pytest.approx(rms(x))
    row = compared(x, 3 * x)
    assert row.scale == pytest.approx(rms(x))
    assert row.relative == pytest.approx(2)


def test_routes_are_held_to_one_another_and_not_to_the_truth():
    """float32 may break a tie of float64 the other way, in both alike."""
    route = np.array([[0, 2], [1, 0]])
    assert compared(route, route, route[:, ::-1]).status == "equal"


def test_misfits_of_shape_kind_and_name():
    a = trace({"forward/x": values(3, 4), "forward/y": values(3), "forward/z": values(2), "forward/only_a": values(2)})
    b = trace(
        {"forward/x": values(4, 3), "forward/y": np.arange(3), "forward/z": values(2), "forward/only_b": values(2)}
    )
    found = compare_traces(a, b)
    statuses = {row.name.removeprefix("forward/"): row.status for row in found.rows}
    assert statuses == {
        "x": "shape",
        "y": "dtype",
        "z": "equal",
        "only_a": "missing in b",
        "only_b": "missing in a",
    }
    assert [row.ok for row in found.rows] == [row.status == "equal" for row in found.rows]


@pytest.mark.parametrize(
    ("dtype", "vanishing", "share", "equal"),
    [
        ("float32", 1e-16, 0.9, True),
        ("float32", 1e-16, 1.1, False),
        ("float32", 1e-9, 0.9, False),
        ("float32", 0.0, 0.9, True),
        ("float32", 0.0, 1.1, False),
        ("bfloat16", 1e-16, 0.9, True),
        ("bfloat16", 1e-16, 1.1, False),
        ("bfloat16", 1e-11, 0.9, False),
        ("float64", 1e-16, 0.9, True),
        ("float64", 1e-16, 1.1, False),
    ],
)
def test_gradients_that_vanish_may_be_noise(dtype, vanishing, share, equal):
    """Noise of 20 roundoffs of the largest gradient, and what AdamW makes of it once gradients are clipped."""
    size = 1e3
    large, small, w = size * values(6, 7), vanishing * size * values(8, seed=2), values(8, seed=3)
    tensors = {"gradient/gate": small, "gradient/w": large, "updated/gate": w}
    noise = 20 * UNIT_ROUNDOFF[dtype] * rms(large)
    parameters, norm = large.size + small.size, rms(large) * large.size**0.5
    first_moment, second_moment = 0.1 / (1 - 0.9**8), 0.95 / (parameters * (1 - 0.95**8))
    moved = 0.01 * first_moment * noise / norm / second_moment**0.5
    floor = 4 * UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"] * rms(w)
    other = {"gradient/gate": shifted(small, share * noise), "gradient/w": large}
    other["updated/gate"] = shifted(w, share * max(moved, floor) if vanishing < 1e-12 else 2 * floor)
    deltas = {dtype: dict.fromkeys(tensors, 1e-30)}
    found = compare_traces(trace(tensors, dtype=dtype), trace(other, dtype=dtype), trace(tensors, deltas=deltas))
    assert {row.name: row.ok for row in found.rows if row.name != "updated/gate"} == {
        "gradient/gate": equal,
        "gradient/w": True,
    }
    if dtype != "float64":  # where the update hides below 1e-12
        assert {row.ok for row in found.rows if row.name == "updated/gate"} == {equal}


def test_decode_has_the_delta_of_the_logits():
    logits = values(2, 8, 5)
    deltas = {"float32": {"forward/output_head": DELTA}}
    for factor, ok in ((0.9, True), (1.1, False)):
        a = trace({"forward/output_head": logits, "decode/1,7": logits}, dtype="float32", deltas=deltas)
        b = trace({"forward/output_head": logits, "decode/1,7": shifted(logits, factor * 10 * DELTA)}, dtype="float32")
        assert compare_traces(a, b).rows[1].ok == ok


def test_seeded_initial_weights_must_be_drawn_alike():
    tensors = {"loss": np.ones(())}
    found = compare_traces(trace(tensors, initial_hash="aa"), trace(tensors, initial_hash="ab"))
    assert found.first_forward is not None
    assert found.first_forward.name == "initial weights"
    assert compare_traces(trace(tensors, initial_hash="aa"), trace(tensors, initial_hash="aa")).equal
    assert compare_traces(trace(tensors, initial_hash="aa"), trace(tensors)).equal


# Deltas that no rounding makes


ROUTED = "[model]\ndim = 20\nnum_experts = 4\n[optimizer]\nlr = 0.01\neps = 1e-8\n"
INDICES = "routing/layers.0.mlp.router.indices"
FLOATS = st.one_of(st.floats(), st.floats(0, 10), st.floats(0, 1e-2), st.integers(-(10**400), 10**400))


def differing_or_refused(a: Trace, b: Trace, truth: Trace | None = None) -> list[str]:
    """Names of the tensors that differ, or what is refused."""
    try:
        return [row.name for row in compare_traces(a, b, truth).failures]
    except UserError as refused:
        return [str(refused).partition(" = ")[0]]


@given(
    delta=FLOATS,
    name=st.sampled_from([*NAMES, "forward/output_head", "updated/layers.0.mlp.experts.1.up_proj.weight"]),
    dtype=st.sampled_from(sorted(TOLERANCES)),
    factor=st.sampled_from([5.0, 0.2, 0.0, -1.5, 1e6]),
    size=st.sampled_from([1e-9, 1e-3, 1.0, 1e6]),
    routed=st.booleans(),
    against_truth=st.booleans(),
)
def test_no_delta_lets_a_difference_of_five_times_pass(delta, name, dtype, factor, size, routed, against_truth):
    """Whatever number stands in the file, and whatever tensor it stands for: the pair is refused, or it differs."""
    right = {"forward/x": values(6, 7, seed=2), "gradient/x": values(6, 7, seed=3), name: size * values(6, 7)}
    right |= {INDICES: np.arange(12).reshape(6, 2) % 4} if routed else {}
    wrong = right | {name: factor * right[name]}
    if name == "forward/output_head":  # whose delta is that of cached decoding
        right, wrong = ({**side, "decode/1,7": side[name]} for side in (right, wrong))
    meta: dict[str, Any] = {"dtype": dtype, **({"config": ROUTED} if routed else {})}
    deltas = {dtype: {key: delta if key == name else 1e-30 for key in right}}
    sides = trace(right, **meta, deltas=deltas), trace(wrong, **meta)
    truth = trace(right, **{**meta, "dtype": "float64"}, deltas=deltas) if against_truth else None
    failures = differing_or_refused(*sides, truth)
    assert name in failures or failures == [f"delta of {name} in {dtype}"]


@given(delta=FLOATS, share=st.sampled_from([0.6, 1.0]), dtype=st.sampled_from(["float32", "bfloat16"]))
@example(delta=100.0, share=0.6, dtype="bfloat16")
def test_no_delta_lets_most_routes_and_all_counts_differ(delta, share, dtype):
    routes = np.random.default_rng(0).integers(0, 8, (50, 2))
    moved = np.where(np.arange(50)[:, None] < share * 50, (routes + 1) % 8, routes)
    for name, right, wrong in (
        (INDICES, routes, moved),
        ("routing/layers.0.expert_counts", np.array([7, 5, 3]), np.array([35, 25, 15])),
    ):
        sides = trace({name: right}, dtype=dtype, deltas={dtype: {name: delta}}), trace({name: wrong}, dtype=dtype)
        assert differing_or_refused(*sides) in ([name], [f"delta of {name} in {dtype}"])


@pytest.mark.parametrize("delta", [np.nan, np.inf, -np.inf, -1e-9, 1e9, 10**400])
def test_a_delta_that_no_rounding_makes_is_refused(delta):
    with pytest.raises(
        UserError, match=r"delta of forward/x in float32 = .*: must be what rounding the weights can do"
    ):
        compared(values(6, 7), values(6, 7), delta=delta)


def test_a_delta_is_no_number_where_the_tensor_is_none():
    """Rounding the weights may turn more of it into NaN, or less."""
    a = values(6, 7)
    a[2, 3] = np.nan
    assert compared(a, a.copy(), delta=np.inf).status == "not finite in both"


def test_deltas_are_those_of_either_trace():
    """A trace that lacks gradients can be compared with one that has them, and its deltas."""
    a, b = trace({"forward/x": values(3)}), trace({"forward/x": values(3), "gradient/x": values(3)})
    b = Trace(b.tensors, dataclasses.replace(b.meta, deltas={"float64": {"forward/x": 1e-15, "gradient/x": 1e-15}}))
    assert {row.name: row.ok for row in compare_traces(a, b).rows} == {"forward/x": True, "gradient/x": False}


def test_what_experts_do_may_change_with_the_routes():
    """The gradient of an expert vanishes with its only token; with the same routes nothing explains that."""
    gradient = "gradient/layers.0.mlp.experts.1.up_proj.weight"
    routes = np.arange(40).reshape(20, 2) % 4
    flipped = routes.copy()
    flipped[3] = flipped[3, ::-1]
    right = {INDICES: routes, gradient: values(6, 7), "gradient/x": values(6, 7)}
    deltas = {"bfloat16": {INDICES: 0.5, gradient: 1.0, "gradient/x": 1e-2}}
    for indices, ok in ((flipped, True), (routes, False)):
        wrong = right | {INDICES: indices, gradient: 0 * right[gradient]}
        sides = (
            trace(right, dtype="bfloat16", config=ROUTED, deltas=deltas),
            trace(wrong, dtype="bfloat16", config=ROUTED),
        )
        assert compare_traces(*sides).equal == ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_models_that_amplify_rounding_are_no_false_alarm(dtype, scale):
    """Sharp attention: scores of many times the usual size."""
    found = compared_with_oracle(CONFIG, dtype, sharper=scale)
    assert found.failures == ()


# Arithmetic that is named


def rounded_to(array: np.ndarray, bits: int) -> np.ndarray:
    """float32 without its last ``bits`` mantissa bits, rounded half up."""
    raw = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64) + (1 << (bits - 1))
    return (raw >> bits << bits).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(("bits", "name"), [(16, "bfloat16"), (13, "TF32")])
@pytest.mark.parametrize("seed", range(3))
def test_the_size_of_coarser_arithmetic_is_named(bits, name, seed, monkeypatch):
    """Where it is seen: operands of every product rounded, or a result that lacks the bits."""
    linear = oracle_linear.linear

    def coarse(x: np.ndarray, weights: Mapping[str, np.ndarray], prefix: str) -> np.ndarray:
        matrix = rounded_to(weights[f"{prefix}.weight"], bits)
        return linear(rounded_to(x, bits), {**weights, f"{prefix}.weight": matrix}, prefix)

    def patched() -> None:
        for module in (oracle_attention, oracle_mlp, oracle_transformer):
            if hasattr(module, "linear"):
                monkeypatch.setattr(module, "linear", coarse)

    (note,) = compared_with_oracle(CONFIG, "float32", before_other=patched, seed=seed).notes
    assert note.startswith("forward/layers.0.attention.q_proj")
    assert f"of the size that {name} leaves" in note


@pytest.mark.parametrize(("bits", "name"), [(16, "bfloat16"), (13, "TF32")])
@pytest.mark.parametrize("delta", [1e-7, 0.0])
def test_values_that_lack_bits_name_their_format(bits, name, delta):
    a = values(40, 50).astype(np.float32)
    b = rounded_to(a, bits).astype(np.float32)
    for other, noted in ((b, True), (a * (1 + 2.0**-9), False), (rounded_to(a * 1.1, bits).astype(np.float32), False)):
        deltas = {"float32": {"forward/x": delta}}
        both = trace({"forward/x": a}, dtype="float32", deltas=deltas), trace({"forward/x": other}, dtype="float32")
        notes = compare_traces(*both).notes
        assert [f"of the size that {name} leaves" in note for note in notes] == ([True] if noted else [])


def planted(change: str, amount: float) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A config or weights that are wrong by an amount."""
    weights = validation_weights(parameter_table(CONFIG), seed=3)
    q_proj = "layers.0.attention.q_proj"
    if change == "eps":
        return CONFIG.replace(norm_eps=CONFIG.norm_eps + amount), weights
    if change == "theta":
        return CONFIG.replace(rope_theta=CONFIG.rope_theta * (1 + 30 * amount)), weights
    if change == "bias":
        weights[f"{q_proj}.bias"] = weights[f"{q_proj}.bias"] * np.float32(1 + amount)
    elif change == "one column":
        weights[f"{q_proj}.weight"] = weights[f"{q_proj}.weight"].copy()
        weights[f"{q_proj}.weight"][0] *= 1 + 4 * amount
    else:
        name = {"scale": f"{q_proj}.weight", "embedding": "token_embedding.embedding.weight"}[change]
        weights[name] = weights[name] * np.float32(1 + amount)
    return CONFIG, weights


@pytest.mark.parametrize("change", ["eps", "theta", "scale", "embedding", "bias", "one column"])
@pytest.mark.parametrize("exponent", [-14, -12, -11, -10, -9, -8, -7])
def test_bugs_of_the_size_of_coarser_arithmetic_are_not_taken_for_it(change, exponent):
    config, weights = planted(change, 2.0**exponent)
    found = compared_with_oracle(config, "float32", other=weights)
    assert found.failures
    assert found.notes == ()


def test_a_nan_has_no_size():
    a, b = values(5), values(5) * (1 + 2**-11)
    b[1] = np.nan
    deltas = {"float32": {"forward/x": 1e-7}}
    both = trace({"forward/x": a}, dtype="float32", deltas=deltas), trace({"forward/x": b}, dtype="float32")
    assert compare_traces(*both).notes == ()


# Order


MODULES = (
    "token_embedding",
    "layers.0.attention.q_proj",
    "layers.0.attention",
    "layers.0.mlp",
    "layers.0",
    "output_head",
)
EXECUTED = (
    *(f"forward/{name}" for name in MODULES[:3]),
    "routing/layers.0.mlp.router.indices",
    *(f"forward/{name}" for name in MODULES[3:]),
    "loss",
    "decode/1,7",
    "gradient/output_head.proj.weight",
    "gradient/layers.0.mlp.up_proj.weight",
    "gradient/layers.0.attention.q_proj.weight",
    "gradient/token_embedding.embedding.weight",
    "updated/output_head.proj.weight",
    "updated/token_embedding.embedding.weight",
    "losses",
)


@given(data=st.data())
def test_order_is_that_of_execution_however_it_was_written(data):
    forward = [name for name in EXECUTED if name.startswith("forward/")]
    mixed = [*forward, *data.draw(st.permutations([name for name in EXECUTED if name not in forward]))]
    written = trace({name: np.ones(()) for name in mixed})
    assert execution_order(written, written) == list(EXECUTED)


@pytest.mark.parametrize("wrong", EXECUTED)
def test_the_first_divergence_is_named(wrong):
    """What comes after a wrong tensor is wrong too; what comes before is not."""
    later = EXECUTED[EXECUTED.index(wrong) :]
    right = {name: values(3, seed=i) for i, name in enumerate(EXECUTED)}
    right["routing/layers.0.mlp.router.indices"] = np.arange(3)
    other = {name: array + 1 if name in later else array for name, array in right.items()}
    found = compare_traces(
        trace(dict(sorted(right.items(), key=_written))), trace(dict(sorted(other.items(), key=_written)))
    )
    assert [row.name for row in found.failures] == list(later)
    forward = next((name for name in later if name.split("/")[0] not in ("gradient", "updated", "losses")), None)
    backward = next((name for name in later if name.split("/")[0] in ("gradient", "updated")), None)
    assert (found.first_forward and found.first_forward.name) == forward
    assert (found.first_backward and found.first_backward.name) == backward


def _written(item: tuple[str, Any]) -> tuple[int, str]:
    """Forward tensors in their order, all else by name."""
    name = item[0]
    return (EXECUTED.index(name), "") if name.startswith("forward/") else (len(EXECUTED), name)


def test_another_order_of_execution_is_noted():
    x, y = values(2), values(3)
    found = compare_traces(
        trace({"forward/x": x, "forward/y": y}), trace({"forward/y": y, "forward/x": x}, backend="jax")
    )
    assert found.notes == ("executed in different order: torch has forward/x where jax has forward/y",)
    assert found.equal


@given(data=st.data())
def test_one_wrong_value_anywhere_is_found(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5))
    right = {f"forward/{i}": values(*shape, seed=i) for i, shape in enumerate(shapes)}
    name = data.draw(st.sampled_from(sorted(right)))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in right[name].shape)
    other = {key: array.copy() for key, array in right.items()}
    other[name][place] += data.draw(st.sampled_from([1e-6, -3.0, np.inf, np.nan]))
    found = compare_traces(trace(right), trace(other))
    assert [row.name for row in found.failures] == [name]
    assert found.failures[0].position == place
    assert found.first_forward == found.failures[0]


# Summaries


@pytest.mark.parametrize("which", ["a", "b", "truth", "all"])
@pytest.mark.parametrize(("factor", "status"), [(0.0, "equal"), (0.8, "within"), (1.25, "differs")])
def test_summaries_give_the_verdict_of_the_values(which, factor, status):
    truth = values(300, 40)
    tensors = {"a": truth, "b": shifted(truth, factor * 10 * DELTA), "truth": truth}
    traces = {side: trace({"forward/x": tensor}, dtype="float32") for side, tensor in tensors.items()}
    traces["truth"] = trace({"forward/x": truth}, deltas={"float32": {"forward/x": DELTA}})
    sides = {side: t.summarized(0) if which in (side, "all") else t for side, t in traces.items()}
    (row,) = compare_traces(sides["a"], sides["b"], sides["truth"]).rows
    assert row.status == status
    if factor:
        assert row.estimated == (which != "a")  # the values of b and of the truth are what b is judged by
        assert row.error == pytest.approx(factor * 10 * DELTA, rel=0.1)


def test_summaries_of_integers_and_of_nan():
    route = np.arange(100)
    a, b = trace({"routing/i": route}), trace({"routing/i": route + (route == 7)})
    assert compare_traces(a.summarized(0), a).equal
    assert not compare_traces(a.summarized(0), b).equal
    x = values(100)
    with_nan = np.where(np.arange(100) == 7, np.nan, x)
    (row,) = compare_traces(trace({"loss": with_nan}).summarized(0), trace({"loss": with_nan})).rows
    assert (row.status, row.nonfinite) == ("not finite in both", 1)
    (row,) = compare_traces(trace({"loss": x}).summarized(0), trace({"loss": with_nan})).rows
    assert (row.status, row.error, row.position) == ("differs", np.inf, None)


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 4}, "seed: 3 and 4"),
        ({"config": "[model]\ndim = 24\n"}, r"model\.dim: 20 and 24"),
        ({"config": "[model]\ndim = 20\n"}, r"optimizer: \{.*\} and None"),
        ({"weights_hash": "cd" * 20}, r"weights: other values \(abababababab\.\.\. and cdcdcdcdcdcd"),
        ({"tokens_hash": "ef" * 20}, "tokens: other values"),
        ({"dtype": "float8"}, "dtype = 'float8': must be one of float64, float32, float16, bfloat16, fp8"),
    ],
)
def test_traces_of_different_runs_are_refused(fields, message):
    tensors = {"loss": np.ones(())}
    a = trace(tensors, weights_hash="ab" * 20, tokens_hash="ab" * 20)
    b = Trace(tensors, dataclasses.replace(a.meta, **fields))
    with pytest.raises(UserError, match=message):
        compare_traces(a, b)
    with pytest.raises(UserError, match=message):
        compare_traces(a, a, b)


def test_how_a_function_is_computed_may_differ():
    text = "[model]\ndim = 20\nsdpa_backend = '{}'\n[train]\ncompile_model = {}\nseq_len = {}\n[distributed]\ntp = {}\n"
    tensors = {"loss": np.ones(())}
    a = trace(tensors, config=text.format("auto", "true", 8, 1))
    assert compare_traces(a, trace(tensors, config=text.format("math", "false", 8, 4))).equal
    with pytest.raises(UserError, match=r"train\.seq_len: 8 and 9"):
        compare_traces(a, trace(tensors, config=text.format("auto", "true", 9, 1)))


def test_only_these_say_how_a_function_is_computed():
    sections = {"distributed", "checkpoint", "metrics", "profiling", "eval"}
    train = {"mixed_precision", "matmul_precision", "compile_model", "scan_layers", "activation_checkpointing"}
    train |= {"health_check_seconds"}
    fields = {"model.sdpa_backend", "model.family", *(f"train.{name}" for name in train)}
    assert execution_names(JobConfig) == sections | fields


def test_a_truth_must_be_float64():
    a = trace({"loss": np.ones(())}, dtype="float32")
    with pytest.raises(UserError, match="the truth: dtype = 'float32': must be 'float64'"):
        compare_traces(a, a, a)


def test_traces_without_tensors_prove_nothing():
    with pytest.raises(UserError, match="trace b: has no tensors"):
        compare_traces(trace({"loss": np.ones(())}), trace({}))


def test_without_any_delta_a_difference_can_not_be_judged():
    x = values(3)
    a, same = trace({"forward/x": x}, dtype="float32"), trace({"forward/x": x}, dtype="float32")
    b = trace({"forward/x": x + 1e-5}, dtype="float32")
    assert compare_traces(a, same).equal
    with pytest.raises(UserError, match=r"neither carries deltas for float32.*float64 trace.*as the truth"):
        compare_traces(a, b)
    with_some = Trace(a.tensors, dataclasses.replace(a.meta, deltas={"float32": {"forward/y": 1.0}}))
    (row,) = compare_traces(with_some, b).rows
    assert (row.status, row.ok, row.multiple) == ("no delta", False, None)


# What comes out


def test_json_holds_everything_a_program_needs():
    a = trace({"forward/x": values(3), "gradient/x": np.zeros(2), "loss": np.ones(())})
    b = trace({"forward/x": np.full(3, np.nan), "gradient/x": np.ones(2)}, backend="jax", device="tpu")
    text = json.dumps(compare_traces(a, b).to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["equal"] is False
    assert (content["tensors"], content["failures"]) == (3, 3)
    assert (content["first_forward"], content["first_backward"]) == ("forward/x", "gradient/x")
    assert content["a"]["backend"] == "torch"
    assert (content["b"]["label"], content["b"]["device"], content["b"]["seed"]) == ("jax", "tpu", 3)
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["forward/x"]["error"] == "inf"
    assert rows["gradient/x"]["value_b"] == 1.0
    assert rows["loss"]["status"] == "missing in b"


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"backend": "jax"}, ("torch", "jax")),
        ({"device": "cuda"}, ("torch cpu", "torch cuda")),
        ({"dtype": "float32"}, ("torch float64", "torch float32")),
        ({}, ("torch (first)", "torch (second)")),
    ],
)
def test_the_two_have_different_names(fields, labels):
    tensors = {"loss": np.ones(())}
    found = compare_traces(trace(tensors), trace(tensors, **fields))
    assert (found.label_a, found.label_b) == labels


def test_heat_maps_show_where_the_first_divergences_are():
    right = {"forward/x": values(2, 8, 20), "forward/y": values(4), "gradient/x": values(3, 5), "gradient/y": values(4)}
    other = {name: array.copy() for name, array in right.items()}
    other["forward/x"][1, 3, 7] += 0.5
    other["gradient/x"][2] += 0.25
    found = compare_traces(trace(right), trace(other))
    assert set(found.heatmaps) == {"forward/x", "gradient/x"}
    forward = np.array(found.heatmaps["forward/x"].values)
    assert found.heatmaps["forward/x"].shape == forward.shape == (16, 20)
    assert np.argwhere(forward).tolist() == [[11, 7]]
    assert forward[11, 7] == pytest.approx(0.5)
    backward = np.array(found.heatmaps["gradient/x"].values)
    assert (backward[2] > 0.2).all()
    assert not backward[:2].any()


def test_heat_maps_of_large_tensors_keep_the_maxima():
    x = np.zeros((7, 100, 1000))
    y = x.copy()
    y[6, 99, 999], y[0, 0, 0], y[3, 50, 500] = 3.0, -2.0, np.nan
    found = np.array(heatmap(y, x).values)
    assert found.shape == (48, 96)
    assert (found[0, 0], found[-1, -1]) == (2.0, 3.0)
    assert np.isinf(found).sum() == 1
    assert np.count_nonzero(found) == 3


# The real thing


CONFIG = ModelConfig(
    dim=20, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=37, ffn_hidden_dim=24, attention_bias=True
)


def executed(modules: list[str]) -> list[str]:
    """Modules in the order in which they end: parts before the whole."""
    return list(
        dict.fromkeys(m for whole in modules for m in [*(m for m in modules if m.startswith(f"{whole}.")), whole])
    )


def oracle_trace(weights: Mapping[str, np.ndarray], config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """Forward and backward of the specification; the loss is half the mean square of the logits."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    tokens = validation_tokens(config.vocab_size, 2, 8, seed=3)
    out = transformer(weights, config, tokens)
    gradients = transformer_backward(out.logits / out.logits.size, out, weights, config, tokens)
    named = {f"forward/{name}": out.activations[name] for name in executed(list(out.activations))}
    named["loss"] = np.asarray(np.mean(out.logits**2) / 2)
    return named | {f"gradient/{name}": np.asarray(array) for name, array in gradients.items()}


def compared_with_oracle(
    config: ModelConfig,
    dtype: str,
    *,
    other: Mapping[str, np.ndarray] | None = None,
    before_other: Callable[[], None] = lambda: None,
    sharper: float = 1.0,
    seed: int = 3,
) -> Comparison:
    """Weights rounded to ``dtype``, and one roundoff of noise on everything, stand for an implementation.

    Args:
        other: weights that the second one uses instead.
        before_other: called before the second one runs.
        sharper: factor of the weights of queries and keys.
    """
    weights = validation_weights(parameter_table(CONFIG), seed=seed)
    sharp = {name: np.float32(sharper**0.5) for name in weights if ".q_proj." in name or ".k_proj." in name}
    weights = {name: array * sharp.get(name, np.float32(1)) for name, array in weights.items()}
    roundoff, rng = UNIT_ROUNDOFF[dtype], np.random.default_rng(0)
    truth = Trace(
        oracle_trace(weights),
        origin(deltas={dtype: perturbation_delta(oracle_trace, weights, roundoff)}),
    )

    def implementation(used: ModelConfig, given: Mapping[str, np.ndarray]) -> Trace:
        tensors = oracle_trace({name: array.astype(DTYPES[dtype]) for name, array in given.items()}, used)
        noisy = {name: x * (1 + roundoff * rng.uniform(-1, 1, x.shape)) for name, x in tensors.items()}
        return trace(noisy, dtype=dtype)

    right = implementation(CONFIG, weights)
    before_other()
    return compare_traces(right, implementation(config, other or weights), truth, ("right", "other"))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_correct_pair_raises_no_alarm(dtype):
    found = compared_with_oracle(CONFIG, dtype)
    assert found.failures == ()
    assert [row.status for row in found.rows].count("within") > 40


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"rope_theta": 500.0}, "forward/layers.0.attention.o_proj"),
        ({"sliding_window": 3}, "forward/layers.0.attention.o_proj"),
        ({"norm_eps": 1e-1}, "forward/layers.0.attention_norm"),
    ],
)
def test_a_wrong_implementation_is_found_where_it_is_wrong(dtype, change, first):
    found = compared_with_oracle(CONFIG.replace(**change), dtype)
    assert found.first_forward is not None
    assert found.first_forward.name == first
    assert found.first_forward.worse == "b"
    assert found.first_backward is not None
