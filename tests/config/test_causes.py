"""Causes of differences: named where they are the cause, and not where something else is."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.parity import Trace, compare_functions
from shared_config.parity.foreign.causes import cause_of
from shared_config.parity.traces import TraceMeta

SHAPE = (2, 40, 12)
few = settings(max_examples=100 if settings.get_current_profile_name() == "nightly" else 3)
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def weight(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).standard_normal((12, 12))


def traces(seed: int, dtype: str, right: Change, wrong: Change) -> tuple[Trace, Trace]:
    """Two recordings of a module that is given the same, with rounding of the dtype."""
    rng = np.random.default_rng(seed)
    given_x = rng.standard_normal(SHAPE) * rng.uniform(0.1, 2, (2, 40, 1))
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    stored = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    a, b = (f(given_x, weight(seed)) for f in (right, wrong))
    delta = unit * float(np.sqrt(np.mean(a * a)))
    meta = TraceMeta("torch", "cpu", dtype, 0, "", deltas={dtype: {"forward/m": delta, "forward/x": delta}})
    plain = {"forward/x": given_x.astype(stored)}
    return Trace({**plain, "forward/m": a.astype(stored)}, meta), Trace({**plain, "forward/m": b.astype(stored)}, meta)


def cause(a: Trace, b: Trace) -> str | None:
    found = compare_functions(a, b)
    assert [row.name for row in found.failures] == ["forward/m"]
    said = cause_of(found.failures[0], a, b, ["forward/x", "forward/m"])
    return None if said is None else said.kind


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w


def put(change: Callable[[np.ndarray], object]) -> Change:
    def changed(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        y = x @ w
        change(y)
        return y

    return changed


def scaled(place: object, factor: float = 4.0) -> Change:
    def multiply(y: np.ndarray) -> None:
        y[place] *= factor  # type: ignore[index]

    return put(multiply)


CAUSES: dict[str, tuple[str, Change, Change]] = {
    "times a number": ("factor", product, lambda x, w: 1.1 * x @ w),
    "one row": ("row", product, scaled(np.s_[:, 7])),
    "one feature": ("row", product, scaled(np.s_[..., 5])),
    "one head": ("head", product, scaled(np.s_[..., 4:8])),
    "from a position on": ("position", product, scaled(np.s_[:, 13:])),
    "moved by one": ("shift", product, lambda x, w: np.roll(x @ w, 1, axis=1)),
    "two features": ("swap", product, lambda x, w: (x @ w)[..., [0, 1, 5, 3, 4, 2, *range(6, 12)]]),
    "two heads": ("swap", product, lambda x, w: (x @ w)[..., [*range(4, 8), *range(4), *range(8, 12)]]),
    "halves for pairs": ("swap", product, lambda x, w: (x @ w)[..., [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]),
    "turned round": ("swap", product, lambda x, w: (x @ w)[..., ::-1]),
    "transposed": ("transposed weight", product, lambda x, w: x @ w.T),
    "eps": ("eps", lambda x, w: normed(x, 1e-6), lambda x, w: normed(x, 0.1)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CAUSES)
@few
@given(seed=st.integers(0, 99))
def test_each_cause_is_named_and_no_other(name: str, dtype: str, seed: int) -> None:
    kind, right, wrong = CAUSES[name]
    assert cause(*traces(seed, dtype, right, wrong)) == kind


UNKNOWN: dict[str, tuple[Change, Change]] = {
    "another weight": (product, lambda x, w: x @ (w + 0.3 * np.cos(w))),
    "another function": (lambda x, w: x / (1 + np.exp(-x)), lambda x, w: x / (1 + np.exp(-1.702 * x))),
    "noise": (product, lambda x, w: x @ w + 0.1 * np.random.default_rng(5).standard_normal(SHAPE)),
    "another norm": (lambda x, w: normed(x, 1e-6), lambda x, w: normed(x - x.mean(-1, keepdims=True), 1e-6)),
    "noise everywhere and a factor": (
        product, lambda x, w: 1.1 * x @ w + 0.1 * np.random.default_rng(5).standard_normal(SHAPE)
    ),
    "transposed and scaled": (product, lambda x, w: 2 * x @ w.T),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", UNKNOWN)
@few
@given(seed=st.integers(0, 99))
def test_what_no_check_confirms_is_not_named(name: str, dtype: str, seed: int) -> None:
    assert cause(*traces(seed, dtype, *UNKNOWN[name])) is None


@few
@given(seed=st.integers(0, 99))
def test_a_narrow_dtype_is_seen_in_the_bits(seed: int) -> None:
    def narrow(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (x @ w).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    assert cause(*traces(seed, "float32", product, narrow)) == "dtype"
    assert cause(*traces(seed, "float32", narrow, product)) == "dtype"
