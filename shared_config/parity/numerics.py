"""How far one array is from another, and how far rounding alone may move it. Pure NumPy, in float64.

Every measure is norm-wise, one tensor at a time. NaN and infinity are compared by place before any arithmetic: equal
places drop out of the norms, and a single unequal place makes every error infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

Arrays = Mapping[str, np.ndarray]
Roundoff = float | Callable[[str], float]
"""One for all weights, or each weight's own, by its name."""

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "fp8": 2.0**-8}
"""Of the results of an arithmetic: with products in FP8 they are bfloat16."""
FLOOR_ROUNDOFFS = 4
"""Roundoffs of rms(truth) that are always allowed: what storing and accumulating the result costs by itself."""


@dataclass(frozen=True)
class Difference:
    """How ``value`` differs from ``truth``; all errors are infinite if NaN or infinity stand in different places.

    Attributes:
        relative_error: norm(value - truth) / norm(truth); 0 if both norms are 0, infinite if only the latter is.
        rms_error: root mean square of value - truth over the finite places.
        truth_rms: root mean square of the truth over the same places.
        max_error: largest absolute difference, at ``index``, of ``value_there`` from ``truth_there``.
        mismatched: number of places where only one side is NaN, or infinities differ.
    """

    relative_error: float
    rms_error: float
    truth_rms: float
    max_error: float
    index: tuple[int, ...]
    value_there: float
    truth_there: float
    mismatched: int

    def where(self) -> str:
        """The worst place and both values there, in words."""
        return f"at {self.index}: {self.value_there!r} against {self.truth_there!r} (off by {self.max_error:.3e})"


def difference(value: ArrayLike, truth: ArrayLike) -> Difference:
    """Compare two arrays of one shape, of any real dtype (bfloat16 included).

    Raises:
        ValueError: if the shapes differ.
    """
    value, truth = _pair(value, truth)
    mismatch = nonfinite_mismatch(value, truth)
    index = worst_position(value, truth)
    mismatched = int(mismatch.sum())
    finite = np.isfinite(truth)
    error = np.inf if mismatched else rms(finite_gap(value, truth)[finite])
    truth_rms = rms(truth[finite])
    return Difference(
        relative_error=_ratio(error, truth_rms),
        rms_error=error,
        truth_rms=truth_rms,
        max_error=np.inf if mismatched else (float(abs(finite_gap(value, truth)[index])) if value.size else 0.0),
        index=index,
        value_there=float(value[index]) if value.size else 0.0,
        truth_there=float(truth[index]) if value.size else 0.0,
        mismatched=mismatched,
    )


def rms(value: ArrayLike) -> float:
    """Root mean square, 0 for an empty array; neither overflows nor underflows where the result does not."""
    value = as_float64(value)
    scale = float(np.max(np.abs(value), initial=0.0))
    if scale == 0.0 or not np.isfinite(scale):
        return scale
    return scale * float(np.sqrt(np.mean(np.square(value / scale))))


def relative_error(value: ArrayLike, truth: ArrayLike) -> float:
    """norm(value - truth) / norm(truth) of one tensor; see `Difference` for zeros, NaN and infinity."""
    return difference(value, truth).relative_error


def nonfinite_mismatch(value: ArrayLike, truth: ArrayLike) -> np.ndarray:
    """True where exactly one side is NaN, or where an infinity does not meet the same infinity."""
    value, truth = _pair(value, truth)
    nan = np.isnan(value) != np.isnan(truth)
    infinite = (np.isinf(value) | np.isinf(truth)) & (value != truth)
    return nan | infinite


def worst_position(value: ArrayLike, truth: ArrayLike) -> tuple[int, ...]:
    """Index of the first NaN or infinity mismatch, else of the largest absolute difference (ties: the first)."""
    value, truth = _pair(value, truth)
    if not value.size:
        return (0,) * value.ndim
    mismatch = nonfinite_mismatch(value, truth)
    flat = np.argmax(mismatch) if mismatch.any() else np.argmax(np.abs(finite_gap(value, truth)))
    return tuple(int(i) for i in np.unravel_index(int(flat), value.shape))


def unit_roundoff(dtype: DTypeLike) -> float:
    """Largest relative error of rounding to ``dtype``: 2^-53, 2^-24, 2^-11 or 2^-8.

    Raises:
        ValueError: if it is not a floating dtype.
    """
    name = np.dtype(dtype).name
    if name not in UNIT_ROUNDOFF:
        raise ValueError(f"dtype = {name}: must be one of {', '.join(UNIT_ROUNDOFF)}")
    return UNIT_ROUNDOFF[name]


def perturb(weights: Arrays, unit_roundoff: Roundoff, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every float weight moved by a relative uniform(-1, 1) * unit_roundoff, as float64; other dtypes unchanged.

    Draws are made in the order of the names, so the order of the mapping does not matter.
    """
    own = unit_roundoff if callable(unit_roundoff) else lambda _: unit_roundoff
    moved = {name: _perturbed(np.asarray(weights[name]), own(name), rng) for name in sorted(weights)}
    return {name: moved[name] for name in weights}


def perturbation_delta(
    function: Callable[[dict[str, np.ndarray]], np.ndarray | float | Arrays],
    weights: Arrays,
    unit_roundoff: Roundoff,
    runs: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """How far rounding the weights moves each output of a float64 function: the unit of every tolerance.

    Args:
        function: weights -> output array, or mapping name -> output array, computed in float64.

    Returns:
        per output name (a single array is named "output") the largest RMS change over the runs.
    """
    found = perturbation_maxima(
        function, weights, unit_roundoff, lambda _, moved, truth: difference(moved, truth).rms_error, runs, seed
    )
    return {name: float(delta) for name, delta in found.items()}


def perturbation_maxima(
    function: Callable[[dict[str, np.ndarray]], np.ndarray | float | Arrays],
    weights: Arrays,
    unit_roundoff: Roundoff,
    measure: Callable[[str, np.ndarray, np.ndarray], ArrayLike],
    runs: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """`perturbation_delta` of any measure of (name, moved output, output): number by number the largest of the runs."""
    truth = _named(function({name: np.asarray(value) for name, value in weights.items()}))
    rng = np.random.default_rng(seed)
    largest: dict[str, np.ndarray] = {}
    for _ in range(runs):
        moved = _named(function(perturb(weights, unit_roundoff, rng)))
        for name in truth:
            found = np.asarray(measure(name, moved[name], truth[name]), np.float64)
            largest[name] = np.maximum(largest.get(name, 0.0), found)
    return largest


def allowed_error(truth: ArrayLike, delta: float, K: float, unit_roundoff: float) -> float:
    """Largest RMS error accepted: K * delta, and never less than a few roundoffs of rms(truth).

    With delta 0 (an output that does not depend on any weight) only the second term is left: such an output may carry
    the rounding of its own storage and nothing else, and an output that is 0 throughout must be 0 exactly.
    """
    truth = as_float64(truth)
    return max(K * delta, FLOOR_ROUNDOFFS * unit_roundoff * rms(truth[np.isfinite(truth)]))


def as_float64(value: ArrayLike) -> np.ndarray:
    """A real array of any dtype (bfloat16 included) as float64."""
    value = np.asarray(value)
    if np.iscomplexobj(value):
        raise ValueError(f"dtype = {value.dtype}: must be a real dtype")
    return value.astype(np.float64)


def _pair(value: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    value, truth = as_float64(value), as_float64(truth)
    if value.shape != truth.shape:
        raise ValueError(f"shape = {value.shape}: must be that of the truth, {truth.shape}")
    return value, truth


def finite_gap(value: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """value - truth where both are finite, 0 elsewhere."""
    finite = np.isfinite(value) & np.isfinite(truth)
    return np.where(finite, value, 0.0) - np.where(finite, truth, 0.0)


def _ratio(error: float, scale: float) -> float:
    if error == 0.0:
        return 0.0
    return error / scale if scale else np.inf


def _perturbed(value: np.ndarray, unit_roundoff: float, rng: np.random.Generator) -> np.ndarray:
    if not (np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16):
        return value
    return value.astype(np.float64) * (1.0 + unit_roundoff * rng.uniform(-1.0, 1.0, value.shape))


def _named(outputs: np.ndarray | float | Arrays) -> dict[str, np.ndarray]:
    return dict(outputs) if isinstance(outputs, Mapping) else {"output": np.asarray(outputs)}
