"""What deltas and ceilings may be at most, in numbers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.parity.configs import step_sensitivity
from shared_config.parity.numerics import UNIT_ROUNDOFF
from shared_config.parity.tolerance import Cancellation, Scales, coarser, scale_of
from shared_config.parity.validation import MOMENT_STEPS

EPS32, EPS16 = 2.0**-24, 2.0**-8
HALF, TWO, TINY = (np.full(4, value) for value in (0.5, 2.0, 1e-13))
TRACE = {
    "forward/x": HALF,
    "forward/y": TWO,
    "forward/zero": TINY,
    "gradient/w": np.full((2, 3), 3.0),
    "gradient/zero": TINY,
    "loss/total": TWO,
}
CONFIG: dict[str, Any] = {"optimizer": {"lr": 0.1}}
DENSE = Scales(TRACE, CONFIG)
ROUTED = Scales({**TRACE, "routing/a.indices": np.zeros((5, 2), np.int32)}, CONFIG)


@pytest.mark.parametrize(
    ("name", "dtype", "tensor", "dense", "routed"),
    [
        ("forward/x", "float32", HALF, 2**16 * EPS32 * 0.5, 4 * 0.5),
        ("forward/x", "bfloat16", HALF, 0.5, 4 * 0.5),
        ("forward/zero", "float32", TINY, 2**16 * EPS32 * 2, 4 * 2),
        ("gradient/w", "float32", HALF, 2**16 * EPS32 * 3, 4 * 3),
        ("updated/w", "float32", HALF, 2**16 * EPS32 * 0.5 + 0.2, 4 * 0.5 + 0.2),
        ("routing/a.counts", "float32", TWO, math.inf, 4 * 2 + 10),
        ("routing/a.counts", "float32", HALF, math.inf, 4 * 1 + 10),
        ("routing/a.indices", "float32", np.zeros((5, 2), np.int32), 10, 10),
    ],
)
def test_largest_deltas(name: str, dtype: str, tensor: np.ndarray, dense: float, routed: float) -> None:
    assert DENSE.largest_delta(name, dtype, tensor) == pytest.approx(dense)
    assert ROUTED.largest_delta(name, dtype, tensor) == pytest.approx(routed)


@pytest.mark.parametrize(
    ("dtype", "stored", "own", "foreign"),
    [
        ("float64", np.float64, 0.0, 0.0),
        ("float32", np.float32, 0.0, 0.1 * 2**-14),
        ("bfloat16", np.float32, 0.0, 0.1 * 2**-14),
        ("bfloat16", ml_dtypes.bfloat16, 0.0, 0.1 * 16 * EPS16),
    ],
)
def test_optimisers_of_other_libraries_round_their_own_steps(
    dtype: str, stored: Any, own: float, foreign: float
) -> None:
    trace = {"gradient/w": np.ones((2, 3)), "updated/w": np.full((2, 3), 1e-3, stored)}
    floor = {"float64": 1e-12, "float32": 4 * EPS32, "bfloat16": 4 * max(EPS32, UNIT_ROUNDOFF[np.dtype(stored).name])}
    for flag, allowed in ((False, own), (True, foreign)):
        scales = Scales(trace, {"optimizer": {"lr": 0.1}}, flag)
        noise = Cancellation(1.0).noise(1.0, UNIT_ROUNDOFF[dtype]) * 0.1 * step_sensitivity({}, 6**0.5, 6)
        expected = max(floor[dtype] * 1e-3, min(noise, 0.025), allowed)
        assert scales.limit("updated/w", dtype, 1e-3, 0.0) == pytest.approx(expected)
        assert (scales.part_limits("updated/w", dtype, 1e-3) is None) == (flag and dtype == "bfloat16")


def test_units_that_rounding_switches_move_gradients_further() -> None:
    kinked = Scales(TRACE, {**CONFIG, "model": {"activation": "relu"}})
    smooth = DENSE.largest_delta("gradient/w", "float32", HALF)
    assert kinked.largest_delta("gradient/w", "float32", HALF) == pytest.approx(16 * smooth)
    assert kinked.largest_delta("updated/w", "float32", HALF) > DENSE.largest_delta("updated/w", "float32", HALF)
    assert kinked.largest_delta("gradient/w", "bfloat16", HALF) == 3
    for name, dtype in (("forward/x", "float32"), ("gradient/w", "float64")):
        assert kinked.largest_delta(name, dtype, HALF) == DENSE.largest_delta(name, dtype, HALF)


def test_models_with_experts_are_routed_whatever_the_trace_holds() -> None:
    for config in ({"model": {"num_experts": 1}}, {"vlm": {"moma_experts_per_modality": {"text": 2}}}):
        assert Scales(TRACE, config).largest_delta("forward/x", "float32", HALF) == 2
    assert Scales(TRACE, {"model": {"num_experts": 0}}).largest_delta("forward/x", "float32", HALF) < 1


@pytest.mark.parametrize(
    ("name", "dtype", "scales", "same_routes", "rerouted"),
    [
        ("forward/x", "float32", (0.5, 2.0), 10 * 2**16 * EPS32 * 0.5, 0.5),
        ("forward/x", "bfloat16", (0.5, 2.0), 0.5, 0.5),
        ("forward/zero", "float32", (1.0, 1e-13), 20 * EPS32 * 2, 20 * EPS32 * 2),
        ("gradient/w", "float32", (0.5, 2.0), 20 * 2**16 * EPS32 * 3, 3 * 0.5),
        ("gradient/w", "float32", (0.01, 2.0), 0.03, 0.03),
        ("gradient/a.experts.0.w", "float32", (0.0, 2.0), 0.0, 1.5 * 2),
        ("routing/a.counts", "float32", (0.0, 2.0), 0.0, 1.5 * 2),
        ("updated/w", "float32", (0.5, 2.0), 0.1, 0.1),
        ("updated/w", "float32", (0.05, 2.0), 0.05, 0.05),
    ],
)
def test_ceilings(name: str, dtype: str, scales: tuple[float, float], same_routes: float, rerouted: float) -> None:
    assert DENSE.ceiling(name, dtype, scales, rerouted=False) == pytest.approx(same_routes)
    assert DENSE.ceiling(name, dtype, scales, rerouted=True) == pytest.approx(rerouted)


def test_limits_are_the_largest_of_deltas_and_what_is_always_allowed() -> None:
    assert DENSE.limit("forward/x", "float32", 1.0, 0.1) == 1.0
    assert DENSE.limit("forward/x", "float32", 1.0, 0.1, ceiling=0.3) == 0.3
    assert DENSE.limit("forward/x", "float32", 1.0, None) == DENSE.limit("forward/x", "float32", 1.0, 0.0) < 1e-5
    assert DENSE.limit("loss/total", "float32", 2.0, None) == pytest.approx(2e-6)
    assert DENSE.limit("gradient/zero", "float32", 1e-13, None) == pytest.approx(20 * EPS32 * 3)
    assert DENSE.limit("gradient/w", "bfloat16", 3.0, 0.1) == pytest.approx(1.0)
    kinked = Scales(TRACE, {**CONFIG, "model": {"activation": "relu"}})
    assert kinked.limit("gradient/w", "bfloat16", 3.0, 0.1) == pytest.approx(3.0)


def test_noise_of_cancelled_gradients() -> None:
    noise = Cancellation(largest=2.0)
    assert (noise.vanishes(2e-12), noise.vanishes(2.1e-12)) == (True, False)
    assert noise.noise(1e-13, EPS16) == 20 * EPS16 * 2
    assert noise.noise(1.0, EPS16) == noise.noise(1.0, EPS32) == 20 * EPS32 * 2
    assert noise.noise(1e-6, EPS32) == 1e-9


def test_a_unit_of_a_gradient_moves_a_step_by_so_much() -> None:
    config = {"optimizer": {"betas": (0.9, 0.95)}, "train": {"grad_clip_norm": 2.0}}
    assert step_sensitivity(config, 4.0, 400) == pytest.approx(2 * step_sensitivity(config, 8.0, 400))
    assert step_sensitivity(config, 1.0, 400) == step_sensitivity(config, 2.0, 400)
    assert step_sensitivity(config, 1.0, 400) == pytest.approx(2 * step_sensitivity(config, 1.0, 100))
    assert step_sensitivity({**config, "train": {"grad_clip_norm": 0.0}}, 8.0, 1) == step_sensitivity(config, 1.0, 1)
    assert step_sensitivity(config, 0.0, 1) == step_sensitivity(config, 1.0, 1)


@pytest.mark.parametrize("betas", [0.9, "ab", {"beta1": 0.9, "beta2": 0.95}, None])
def test_a_trace_whose_betas_are_no_pair_is_refused(betas: object) -> None:
    with pytest.raises(UserError, match=r"optimizer.betas = .*: must be two numbers"):
        step_sensitivity({"optimizer": {"betas": betas}}, 1.0, 4)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.5, 0.999), (0.0, 0.3)])
def test_a_step_grows_with_a_gradient_as_adams_does(betas: tuple[float, float]) -> None:
    """The moments after `MOMENT_STEPS` updates, and one more update with a gradient far smaller than they are."""
    parameters, gradient, updates = 400, 1e-6, MOMENT_STEPS + 1
    first, second = (1 - betas[0]) * gradient, betas[1] / parameters + (1 - betas[1]) * gradient**2
    step = first / (1 - betas[0] ** updates) / math.sqrt(second / (1 - betas[1] ** updates))
    found = step_sensitivity({"optimizer": {"betas": betas}, "train": {"grad_clip_norm": 0.0}}, 1.0, parameters)
    assert found == pytest.approx(step / gradient, rel=1e-6)


def test_a_gradient_is_clipped_by_the_norm_of_all_its_elements() -> None:
    norm, parameters = math.sqrt(6 * 3.0**2), 10
    assert DENSE._step_of_gradient == pytest.approx(0.1 * step_sensitivity(CONFIG, norm, parameters))


def test_scales_are_of_what_is_finite_and_the_coarser_dtype_counts() -> None:
    assert scale_of(np.array([3.0, np.nan, -3.0, np.inf])) == 3.0
    assert coarser("bfloat16", "float32") == coarser("float32", "bfloat16") == "bfloat16"
    assert coarser("float64", "float32") == "float32"
    assert coarser("fp8", "bfloat16") == coarser("bfloat16", "fp8") == "fp8"


def test_parts_are_judged_but_for_those_of_what_is_zero_by_mathematics() -> None:
    assert DENSE.part_limits("updated/w", "float32", 0.5) is not None
    assert DENSE.part_limits("gradient/w", "float32", 3.0) is not None
    assert DENSE.part_limits("updated/zero", "float32", 0.5) is None
    assert DENSE.part_limits("gradient/zero", "float32", 1e-13) is None
    assert DENSE.part_limits("loss/total", "float32", 2.0) is None
