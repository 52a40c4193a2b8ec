"""Every check passes what it should and fails what it should."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shared_config.parity.numerics import (
    allowed_error,
    difference,
    nonfinite_mismatch,
    perturb,
    perturbation_delta,
    relative_error,
    rms,
    unit_roundoff,
    worst_position,
)
from tests.tolerance import (
    assert_all_same_function,
    assert_all_within,
    assert_same_function,
    assert_ulp,
    assert_within,
    first_divergence,
    ulp_distance,
)

bfloat16 = ml_dtypes.bfloat16
TRUTH = np.random.default_rng(0).standard_normal((3, 5))


def moved(relative: float, index: tuple[int, int] = (1, 2)) -> np.ndarray:
    """TRUTH with one element off so that the norm-wise relative error is ``relative``."""
    value = TRUTH.copy()
    value[index] += relative * np.linalg.norm(TRUTH)
    return value


def test_rms_neither_overflows_nor_underflows():
    assert rms([3.0, 4.0]) == pytest.approx(np.sqrt(12.5))
    assert rms([3e300, 4e300]) == pytest.approx(np.sqrt(12.5) * 1e300)
    assert rms([3e-300, 4e-300]) == pytest.approx(np.sqrt(12.5) * 1e-300)
    assert rms(np.zeros((0, 2))) == 0.0
    assert rms([1.0, np.inf]) == np.inf


def test_relative_error_is_norm_wise():
    assert relative_error(moved(1e-3), TRUTH) == pytest.approx(1e-3)
    assert relative_error(TRUTH, TRUTH) == 0.0
    assert relative_error([0.0], [0.0]) == 0.0
    assert relative_error([1e-300], [0.0]) == np.inf
    assert relative_error(np.array([1.0, 2.0], bfloat16), [1.0, 2.0]) == 0.0


@pytest.mark.parametrize(
    ("value", "truth"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, -np.inf), (np.nan, np.inf)]
)
def test_misplaced_nan_or_infinity_is_an_infinite_error(value: float, truth: float):
    found = difference([5.0, value], [5.0, truth])
    assert (found.mismatched, found.index) == (1, (1,))
    assert found.relative_error == found.rms_error == found.max_error == np.inf
    with pytest.raises(AssertionError, match="NaN or infinity in 1 places"):
        assert_same_function(np.array([5.0, value]), np.array([5.0, truth]), "x")
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_within(np.array([5.0, value]), np.array([5.0, truth]), 1e300, 10)


def test_nan_and_infinity_in_the_same_places_agree_and_leave_the_rest_compared():
    truth = np.array([np.nan, np.inf, -np.inf, 1.0])
    assert not nonfinite_mismatch(truth, truth).any()
    assert_same_function(truth.copy(), truth, "x")
    with pytest.raises(AssertionError, match=r"at \(3,\)"):
        assert_same_function(truth + np.array([0, 0, 0, 1e-11]), truth, "x")


def test_shapes_must_agree_exactly():
    with pytest.raises(ValueError, match=r"shape = \(1, 3\): must be that of the truth, \(3,\)"):
        nonfinite_mismatch(np.ones((1, 3)), np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        difference(np.ones((1, 3)), np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        ulp_distance(np.ones((1, 3)), np.ones(3))


def test_worst_position():
    assert worst_position(moved(1e-3, (2, 4)), TRUTH) == (2, 4)
    assert worst_position([1.0, 5.0, np.nan], [9.0, 5.0, 0.0]) == (2,)


def test_same_function_separates_rounding_from_difference():
    assert_same_function(TRUTH * (1 + 2**-52), TRUTH, "x")
    assert_same_function(moved(0.9e-12), TRUTH, "x")
    with pytest.raises(AssertionError):
        assert_same_function(moved(1.1e-12), TRUTH, "x")
    assert_same_function(moved(1e-9), TRUTH, "x", delta=1e-9)
    with pytest.raises(AssertionError):
        assert_same_function(moved(1e-9), TRUTH, "x", delta=1e-13)


def test_same_function_refuses_narrow_results():
    with pytest.raises(AssertionError, match="must be float64"):
        assert_same_function(TRUTH.astype(np.float32), TRUTH, "x")


def test_message_names_tensor_place_values_multiple_and_context():
    value = TRUTH.copy()
    value[1, 2] = 7.0
    with pytest.raises(AssertionError) as caught:
        assert_within(value, TRUTH, 1e-3, 10, "layers.0.mlp", context={"seed": 3})
    message = str(caught.value)
    multiple = rms(value - TRUTH) / 1e-3
    for part in ("layers.0.mlp", "(1, 2)", "7.0", repr(float(TRUTH[1, 2])), f"{multiple:.3g} times delta", "'seed': 3"):
        assert part in message


def test_perturbation_moves_every_float_weight_by_at_most_the_roundoff():
    weights = {"b": np.ones((40, 50), np.float32), "a": np.full(7, 2.0), "ids": np.arange(3)}
    new = perturb(weights, 1e-3, np.random.default_rng(0))
    assert list(new) == ["b", "a", "ids"]
    assert new["b"].dtype == np.float64
    step = new["b"] - 1
    assert 0.99e-3 < np.abs(step).max() <= 1e-3
    assert abs(step.mean()) < 5e-5
    assert (step != 0).all()
    np.testing.assert_array_equal(new["ids"], weights["ids"])
    again = perturb(dict(reversed(weights.items())), 1e-3, np.random.default_rng(0))
    np.testing.assert_array_equal(new["b"], again["b"])


def test_delta_is_the_largest_change_and_scales_with_the_roundoff():
    weights = {"w": TRUTH}

    def function(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"same": w["w"] * 3, "fixed": np.ones(2)}

    delta = perturbation_delta(function, weights, 1e-6, runs=3, seed=1)
    assert delta["fixed"] == 0.0
    rng = np.random.default_rng(1)
    changes = [rms(3 * (perturb(weights, 1e-6, rng)["w"] - TRUTH)) for _ in range(3)]
    assert delta["same"] == pytest.approx(max(changes), rel=1e-6)
    finer = perturbation_delta(function, weights, 1e-8, runs=3, seed=1)
    assert delta["same"] / finer["same"] == pytest.approx(100, rel=1e-3)
    assert perturbation_delta(lambda w: w["w"], weights, 1e-6).keys() == {"output"}


def test_within_is_a_multiple_of_delta():
    delta = 1e-6
    exact = rms(moved(1e-4) - TRUTH)
    assert_within(moved(1e-4), TRUTH, exact / 9.9, 10)
    with pytest.raises(AssertionError, match=r"10\.1 times delta"):
        assert_within(moved(1e-4), TRUTH, exact / 10.1, 10)
    with pytest.raises(AssertionError):
        assert_all_within({"x": moved(1e-4)}, {"x": TRUTH}, {"x": delta}, 10)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_delta_zero_allows_the_rounding_of_the_dtype_and_no_more(dtype: type):
    roundoff = unit_roundoff(dtype)
    assert_within(TRUTH.astype(dtype), TRUTH, 0.0, 10)
    with pytest.raises(AssertionError, match="delta = 0"):
        assert_within((TRUTH * (1 + 8 * roundoff)).astype(dtype), TRUTH, 0.0, 10)
    assert_within(np.zeros(3, dtype), np.zeros(3), 0.0, 10)
    with pytest.raises(AssertionError):
        assert_within(np.array([0, 1e-30, 0], dtype), np.zeros(3), 0.0, 10)


def test_unit_roundoff_is_half_the_gap_above_one():
    assert unit_roundoff(np.float64) == np.finfo(np.float64).eps / 2
    assert unit_roundoff(np.float32) == np.finfo(np.float32).eps / 2
    assert unit_roundoff(bfloat16) == float(ml_dtypes.finfo(bfloat16).eps) / 2
    with pytest.raises(ValueError, match="int32"):
        unit_roundoff(np.int32)
    assert allowed_error(np.ones(3), 0.0, 10, 2**-24) == 4 * 2**-24


def test_all_checks_need_the_same_names():
    with pytest.raises(AssertionError, match=r"missing \['b'\], extra \['c'\]"):
        assert_all_same_function({"a": TRUTH, "c": TRUTH}, {"a": TRUTH, "b": TRUTH})
    with pytest.raises(AssertionError, match="missing"):
        assert_all_within({}, {"b": TRUTH}, {"b": 1.0})


def test_first_divergence_is_the_first_in_order():
    pairs = [("a", TRUTH, TRUTH), ("b", moved(1e-9), TRUTH), ("c", moved(1e-3), TRUTH)]
    found = first_divergence(pairs)
    assert found is not None
    assert (found[0], found[1].index) == ("b", (1, 2))
    assert first_divergence(pairs, limit=1e-6)[0] == "c"  # type: ignore[index]
    assert first_divergence(pairs, limit=1.0) is None
    assert first_divergence([("n", [np.nan], [0.0])], limit=1e300) is not None


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_ulp_counts_representable_numbers(dtype: type):
    one = np.array([1.0, -1.0, 0.0, 1e-3], dtype)
    up = one
    for _ in range(5):
        up = np.nextafter(up, np.array(np.inf, dtype))
    np.testing.assert_array_equal(ulp_distance(up, one), [5, 5, 5, 5])
    np.testing.assert_array_equal(ulp_distance(one, up), [5, 5, 5, 5])
    tiny = np.nextafter(np.array([0], dtype), np.array([1], dtype))
    np.testing.assert_array_equal(ulp_distance(-tiny, tiny), [2])
    np.testing.assert_array_equal(ulp_distance(np.array([-0.0], dtype), np.array([0.0], dtype)), [0])


def test_ulp_of_bfloat16_and_of_the_extremes():
    assert ulp_distance(np.array([1.0078125], bfloat16), np.array([1.0], bfloat16))[0] == 1
    assert ulp_distance(np.array([-1.0], bfloat16), np.array([1.0], bfloat16))[0] == 2 * 0x3F80
    largest = np.finfo(np.float64).max
    assert ulp_distance([-largest], [largest])[0] == 2 * 0x7FEFFFFFFFFFFFFF
    assert ulp_distance([np.nan], [np.nan])[0] == 0
    assert ulp_distance([np.nan], [1.0])[0] == ulp_distance([1.0], [np.nan])[0] == np.iinfo(np.uint64).max
    with pytest.raises(ValueError, match="dtype"):
        ulp_distance(np.ones(1, np.float32), np.ones(1))
    with pytest.raises(ValueError, match="dtype"):
        ulp_distance([1], [1])


def test_assert_ulp_fails_one_past_the_limit():
    truth = np.linspace(0.5, 2, 7, dtype=np.float32)
    near = truth.copy()
    for _ in range(8):
        near[3] = np.nextafter(near[3], np.float32(np.inf))
    assert_ulp(near, truth, 8)
    near[3] = np.nextafter(near[3], np.float32(np.inf))
    with pytest.raises(AssertionError, match=r"silu: 9 ulp at \(3,\).*\nseed 4"):
        assert_ulp(near, truth, 8, "silu", context="seed 4")
    assert_ulp(truth, truth.astype(np.float64) * (1 + 2**-26), 0)
    with pytest.raises(AssertionError):
        assert_ulp(np.full(1, np.nan, np.float32), np.ones(1, np.float32))
