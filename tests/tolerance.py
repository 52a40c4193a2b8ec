"""The three strengths of comparison, as assertions whose messages say what, where and by how much.

1. float64 against float64: `assert_same_function`, relative 1e-12.
2. float32 and bfloat16 against the float64 truth: `assert_within` K * delta, delta from `perturbation_delta`.
3. Elementwise operations: `assert_ulp`, 8 units in the last place.

All take NaN and infinity by place first: they must stand where the truth has them. ``context`` is whatever reproduces
the case (config, seed) and ends the message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from shared_config.parity.compare import TOLERANCES
from shared_config.parity.numerics import (
    Difference,
    allowed_error,
    difference,
    perturb,
    perturbation_delta,
    relative_error,
    rms,
    unit_roundoff,
)
from shared_config.parity.traces import FORWARD, GRADIENT

__all__ = [
    "BFLOAT16_GRADIENT_K",
    "BFLOAT16_K",
    "FORWARD_K",
    "GRADIENT_K",
    "SAME_FUNCTION",
    "assert_all_same_function",
    "assert_all_within",
    "assert_same_function",
    "assert_ulp",
    "assert_within",
    "first_divergence",
    "perturb",
    "perturbation_delta",
    "relative_error",
    "rms",
    "ulp_distance",
    "unit_roundoff",
]

SAME_FUNCTION = TOLERANCES["float64"][FORWARD].relative
FORWARD_K, GRADIENT_K = (TOLERANCES["float32"][group].K for group in (FORWARD, GRADIENT))
BFLOAT16_K, BFLOAT16_GRADIENT_K = (TOLERANCES["bfloat16"][group].K for group in (FORWARD, GRADIENT))
"""Multiples of delta. 300 pairs of correct models (`tests/parity/derive_tolerances.py`, CPU, 2026-11-24), medians
between 0.9 and 1.9, were off by at most:

    ==========  =======  ========
    dtype       forward  gradient
    ==========  =======  ========
    float32     72.6     10.4
    bfloat16    6.4      8.7
    ==========  =======  ========

Forward errors beyond K * delta were all below the floor of a few roundoffs (`numerics.allowed_error`)."""
MAX_ULP = 8

INTEGER_OF = {"float64": np.int64, "float32": np.int32, "float16": np.int16, "bfloat16": np.int16}


def assert_same_function(
    value: Any, truth: Any, name: str, limit: float = SAME_FUNCTION, *, delta: float = 0.0, context: Any = None
) -> None:
    """Both float64, one the other's truth: relative error at most ``limit``.

    Args:
        delta: for ill-conditioned draws, the perturbation delta at 2^-53; the error may then also be up to 10 * delta.
    """
    _check_dtype(value, np.float64, name)
    found = difference(value, truth)
    allowed = max(limit * found.truth_rms, FORWARD_K * delta)
    if not found.rms_error <= allowed:
        raise AssertionError(
            _message(name, found, f"relative error {found.relative_error:.3e}, allowed {limit:.1e}", delta, context)
        )


def assert_within(
    value: Any,
    truth: Any,
    delta: float,
    K: float = FORWARD_K,
    name: str = "output",
    *,
    roundoff: float | None = None,
    context: Any = None,
) -> None:
    """RMS error against the float64 truth at most K * delta, or a few roundoffs of rms(truth) where delta is smaller
    still.

    So with delta 0 the value may carry the rounding of its own dtype only, and a truth of 0 must be met exactly.

    Args:
        roundoff: unit roundoff of the arithmetic; None means that of ``value``'s dtype.
    """
    found = difference(value, truth)
    roundoff = unit_roundoff(np.asarray(value).dtype) if roundoff is None else roundoff
    allowed = allowed_error(truth, delta, K, roundoff)
    if not found.rms_error <= allowed:
        raise AssertionError(
            _message(name, found, f"rms error {found.rms_error:.3e}, allowed {allowed:.3e} (K = {K:g})", delta, context)
        )


def assert_all_same_function(
    values: Mapping[str, Any], truths: Mapping[str, Any], limit: float = SAME_FUNCTION, *, context: Any = None
) -> None:
    """`assert_same_function` for every tensor, in the truth's order: the first to diverge is reported."""
    _check_names(values, truths)
    for name, truth in truths.items():
        assert_same_function(values[name], truth, name, limit, context=context)


def assert_all_within(
    values: Mapping[str, Any],
    truths: Mapping[str, Any],
    deltas: Mapping[str, float],
    K: float = FORWARD_K,
    *,
    roundoff: float | None = None,
    context: Any = None,
) -> None:
    """`assert_within` for every tensor, in the truth's order."""
    _check_names(values, truths)
    for name, truth in truths.items():
        assert_within(values[name], truth, deltas[name], K, name, roundoff=roundoff, context=context)


def first_divergence(
    pairs: Iterable[tuple[str, Any, Any]], limit: float = SAME_FUNCTION
) -> tuple[str, Difference] | None:
    """The first tensor, in order, whose relative error exceeds ``limit``; None if none does.

    Args:
        pairs: (name, value, truth) in the order of computation.
    """
    for name, value, truth in pairs:
        found = difference(value, truth)
        if not found.relative_error <= limit:
            return name, found
    return None


def ulp_distance(value: Any, truth: Any) -> np.ndarray:
    """How many representable numbers of their common dtype lie from one to the other, elementwise.

    +0 and -0 are the same number; NaN is at distance 0 from NaN and at the largest integer from any number.

    Returns:
        uint64, of the arrays' shape.

    Raises:
        ValueError: if shapes or dtypes differ, or the dtype is not float64, float32, float16 or bfloat16.
    """
    value, truth = np.asarray(value), np.asarray(truth)
    if value.dtype != truth.dtype or value.dtype.name not in INTEGER_OF:
        raise ValueError(f"dtype = {value.dtype}, {truth.dtype}: must be one of {', '.join(INTEGER_OF)} and the same")
    if value.shape != truth.shape:
        raise ValueError(f"shape = {value.shape}: must be that of the truth, {truth.shape}")
    one_nan = np.isnan(value) != np.isnan(truth)
    both_nan = np.isnan(value) & np.isnan(truth)
    a, b = _place(value), _place(truth)
    apart = np.where(a > b, a.view(np.uint64) - b.view(np.uint64), b.view(np.uint64) - a.view(np.uint64))
    return np.where(both_nan, np.uint64(0), np.where(one_nan, np.iinfo(np.uint64).max, apart))


def assert_ulp(value: Any, truth: Any, limit: int = MAX_ULP, name: str = "output", *, context: Any = None) -> None:
    """Every element within ``limit`` units in the last place of ``value``'s dtype.

    Args:
        truth: of the same dtype, or of a wider one, which is then rounded once.
    """
    value, truth = np.asarray(value), np.asarray(truth)
    if value.dtype != truth.dtype and np.dtype(truth.dtype).itemsize > value.dtype.itemsize:
        truth = truth.astype(value.dtype)
    apart = ulp_distance(value, truth)
    if apart.size and int(apart.max()) > limit:
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(apart)), apart.shape))
        raise AssertionError(
            f"{name}: {int(apart[index])} ulp at {index}: {value[index]!r} against {truth[index]!r}, allowed {limit}"
            + _suffix(context)
        )


def _place(value: np.ndarray) -> np.ndarray:
    """Position of each number on the line of representable ones, int64; 0 for both zeros."""
    bits = value.view(INTEGER_OF[value.dtype.name]).astype(np.int64)
    magnitude = bits & np.int64(np.iinfo(INTEGER_OF[value.dtype.name]).max)
    return np.where(bits < 0, -magnitude, magnitude)


def _check_dtype(value: Any, dtype: Any, name: str) -> None:
    """A float32 result compared at 1e-12 is a mistake of the test; say so instead of calling it a divergence."""
    found = np.asarray(value).dtype
    floating = np.issubdtype(found, np.floating) or found == ml_dtypes.bfloat16
    if floating and found != dtype:
        raise AssertionError(f"{name}: dtype = {found}: must be {np.dtype(dtype)} for this comparison")


def _check_names(values: Mapping[str, Any], truths: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(truths) - set(values)), sorted(set(values) - set(truths))
    if missing or extra:
        raise AssertionError(f"tensors do not correspond: missing {missing}, extra {extra}")


def _message(name: str, found: Difference, measure: str, delta: float, context: Any) -> str:
    lines = [f"{name}: {measure}"]
    if found.mismatched:
        lines.append(f"NaN or infinity in {found.mismatched} places where the other side has none")
    lines.append(f"largest error {found.where()}")
    lines.append(f"{found.rms_error / delta:.3g} times delta = {delta:.3e}" if delta else "delta = 0")
    return "; ".join(lines) + _suffix(context)


def _suffix(context: Any) -> str:
    return "" if context is None else f"\n{context}"
