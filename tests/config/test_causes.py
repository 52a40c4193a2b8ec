"""Causes of differences: named where they are the cause, and not where something else is."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.parity import Trace, compare_functions
from shared_config.parity.foreign.causes import CHECKS, PLACES, Cause, cause_of
from shared_config.parity.numerics import UNIT_ROUNDOFF, rms
from shared_config.parity.tolerance import tolerance_of
from shared_config.parity.traces import TraceMeta

SHAPE = (2, 40, 12)
NIGHTLY = settings.get_current_profile_name() == "nightly"
few, one = (settings(max_examples=100 if NIGHTLY else examples) for examples in (3, 1))
Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


def normed(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def weight(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).standard_normal((12, 12))


def traces(seed: int, dtype: str, right: Change, wrong: Change) -> tuple[Trace, Trace]:
    """Two recordings of a module that is given the same, with rounding of the dtype."""
    rng = np.random.default_rng(seed)
    given_x = rng.standard_normal(SHAPE) * rng.uniform(0.1, 2, (2, 40, 1))
    unit, stored = UNIT_ROUNDOFF[dtype], ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    a, b = (f(given_x, weight(seed)) for f in (right, wrong))
    delta = unit * rms(a)
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


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1e-4), ("float32", 1e4), ("float64", 1e-300), ("float64", 1e300)]
)
@pytest.mark.parametrize("name", CAUSES)
@few
@given(seed=st.integers(0, 99))
def test_causes_do_not_depend_on_units(name: str, dtype: str, scale: float, seed: int) -> None:
    kind, right, wrong = CAUSES[name]
    rounding = 1 + 2 * UNIT_ROUNDOFF[dtype] * np.random.default_rng(seed).uniform(-1, 1, SHAPE)
    found = traces(seed, dtype, lambda x, w: scale * right(x, w), lambda x, w: scale * rounding * wrong(x, w))
    assert cause(*found) == kind


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


def with_block_transposed(w: np.ndarray) -> np.ndarray:
    return np.block([[w[:6, :6].T, w[:6, 6:]], [w[6:]]])


def narrowed(y: np.ndarray, dtype: object = ml_dtypes.bfloat16) -> np.ndarray:
    return y.astype(np.float32).astype(dtype).astype(np.float64)  # type: ignore[arg-type]


def cut_off(y: np.ndarray) -> np.ndarray:
    """The upper half of the bits of float32."""
    return (y.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


POSITIONS, FEATURES = np.arange(40)[:, None], np.arange(12)

NEAR_MISSES: dict[str, tuple[Change, Change]] = {
    "factor: two of them": (product, lambda x, w: (x @ w) * np.where(FEATURES < 6, 1.1, 1.2)),
    "factor: something added": (product, lambda x, w: x @ w + 0.5),
    "row: two of them": (product, scaled(np.s_[:, [3, 9]])),
    "row: a little everywhere": (product, lambda x, w: np.where(POSITIONS == 7, 4, 1.05) * (x @ w)),
    "head: begins within another": (product, scaled(np.s_[..., 3:7])),
    "head: a width that does not divide": (product, scaled(np.s_[..., 5:10])),
    "head: two of them": (product, scaled(np.s_[..., [0, 1, 2, 3, 8, 9, 10, 11]])),
    "position: not to the end": (product, scaled(np.s_[:, 13:25])),
    "position: up to one": (product, scaled(np.s_[:, :13])),
    "shift: by three": (product, lambda x, w: np.roll(x @ w, 3, axis=1)),
    "shift: mean with the neighbour": (product, lambda x, w: (x @ w + np.roll(x @ w, 1, axis=1)) / 2),
    "shift: scaled too": (product, lambda x, w: 1.1 * np.roll(x @ w, 1, axis=1)),
    "swap: scaled too": (
        product, lambda x, w: (x @ w)[..., [0, 1, 5, 3, 4, 2, *range(6, 12)]] * np.where(FEATURES == 2, 2, 1)
    ),
    "swap: an order that nobody knows": (product, lambda x, w: (x @ w)[..., [4, 9, 2, 7, 0, 11, 5, 1, 10, 3, 8, 6]]),
    "transposed weight: and a part of the other": (product, lambda x, w: x @ (w.T + 0.2 * w)),
    "eps: outside the root": (
        lambda x, w: normed(x, 1e-6), lambda x, w: x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + 0.1)
    ),
    "eps: rows of lengths of their own": (
        lambda x, w: normed(x, 1e-6), lambda x, w: normed(x, 1e-6) * (1 + 0.1 * np.sin(POSITIONS + 0.5))
    ),
    "eps: a mean of absolute values": (
        lambda x, w: normed(x, 1e-6), lambda x, w: x / np.mean(np.abs(x), axis=-1, keepdims=True)
    ),
    "eps: and a weight": (
        lambda x, w: normed(x, 1e-6), lambda x, w: normed(x, 0.1) * (1 + 0.1 * np.cos(FEATURES))
    ),
}  # fmt: skip
"""What is nearly of a kind, and must not be called so: nothing else either."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NEAR_MISSES)
@one
@given(seed=st.integers(0, 99))
def test_a_near_miss_is_not_named(name: str, dtype: str, seed: int) -> None:
    assert cause(*traces(seed, dtype, *NEAR_MISSES[name])) is None


@one
@given(seed=st.integers(0, 99))
def test_a_position_before_that_has_half_of_the_error_is_no_start(seed: int) -> None:
    limit = tolerance_of("forward", "float32").K * 2.0**-24
    signs = (-1.0) ** FEATURES

    def off(early: float) -> Change:
        sizes = np.where(POSITIONS >= 13, 1.8, np.where(POSITIONS == 5, early, 0.0)) * limit * signs
        return lambda x, w: x @ w + np.sqrt(np.mean((x @ w) ** 2)) * sizes

    assert cause(*traces(seed, "float32", product, off(0.0))) == "position"
    assert cause(*traces(seed, "float32", product, off(0.9))) is None


def test_every_kind_is_planted_and_nearly_missed() -> None:
    kinds = {kind for kind, _, _ in CAUSES.values()}
    assert {name.partition(":")[0] for name in NEAR_MISSES} == kinds
    assert {check.__name__ for check in CHECKS} - {"part"} == {kind.replace(" ", "_") for kind in kinds - set(PLACES)}
    assert all(f'"{kind}"' in (Cause.__doc__ or "") for kind in (*kinds, "dtype"))


PARTS_OF_A_TENSOR: dict[str, tuple[Change, str]] = {
    "three features in a ring": (lambda x, w: (x @ w)[..., [1, 2, 0, *range(3, 12)]], "block 0 of 4 of the last axis"),
    "a feature for another": (lambda x, w: (x @ w)[..., [0, 1, 5, *range(3, 12)]], "all of it at 2 of axis 2, of 12"),
    "a block of a weight": (lambda x, w: x @ with_block_transposed(w), "block 0 of 2 of the last axis, 6 wide"),
    "half of it moved": (
        lambda x, w: np.concatenate([(x @ w)[..., :6], np.roll((x @ w)[..., 6:], 1, axis=1)], -1),
        "block 1 of 2 of the last axis, 6 wide",
    ),
}


@pytest.mark.parametrize("name", PARTS_OF_A_TENSOR)
@one
@given(seed=st.integers(0, 99))
def test_of_what_has_no_known_cause_it_is_said_where_all_of_it_is(name: str, seed: int) -> None:
    change, text = PARTS_OF_A_TENSOR[name]
    a, b = traces(seed, "float32", product, change)
    assert text in said_of(a, b)


def said_of(a: Trace, b: Trace) -> str:
    """The cause in words."""
    found = cause_of(compare_functions(a, b).failures[0], a, b, ["forward/x", "forward/m"])
    assert found is not None
    return found.text


TEXTS: dict[str, tuple[Change, Change, str]] = {
    "factor": (product, lambda x, w: 1.1 * x @ w, "b is 1.1 times a"),
    "known factor": (product, lambda x, w: x @ w * 12**0.5, "b is sqrt(12) times a"),
    "its inverse": (product, lambda x, w: x @ w / 8, "b is 1/sqrt(64) times a"),
    "row": (product, scaled(np.s_[:, 7]), "all of it at 7 of axis 1, of 40"),
    "head": (product, scaled(np.s_[..., 4:8]), "all of it in block 1 of 3 of the last axis, 4 wide"),
    "position": (product, scaled(np.s_[:, 13:]), "all of it from 13 on along axis 1, of 40"),
    "behind": (product, lambda x, w: np.roll(x @ w, 1, axis=1), "off by 1 along axis 1: b is behind"),
    "ahead": (product, lambda x, w: np.roll(x @ w, -2, axis=2), "off by 2 along axis 2: b is ahead"),
    "two": (product, lambda x, w: (x @ w)[..., [0, 1, 5, 3, 4, 2, *range(6, 12)]], "axis 2: 2 and 5 are exchanged"),
    "blocks": (
        product, lambda x, w: (x @ w)[..., [*range(4, 8), *range(4), *range(8, 12)]], "0 and 1 of 3 are exchanged"
    ),
    "turned": (product, lambda x, w: (x @ w)[:, ::-1], "another order along axis 1: turned round"),
    "eps": (lambda x, w: normed(x, 1e-6), lambda x, w: normed(x, 0.1), "in a, 0.1 in b"),
    "other eps": (lambda x, w: normed(x, 0.2), lambda x, w: normed(x, 1e-6), "eps of a norm: 0.2 in a, "),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@one
@given(seed=st.integers(0, 99))
def test_a_cause_says_where_and_by_how_much(name: str, seed: int) -> None:
    right, wrong, text = TEXTS[name]
    assert text in said_of(*traces(seed, "float32", right, wrong))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@one
@given(seed=st.integers(0, 99))
def test_a_narrow_dtype_is_seen_in_the_bits(dtype: type, seed: int) -> None:
    def narrow(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return narrowed(x @ w, dtype)

    name = np.dtype(dtype).name
    assert said_of(*traces(seed, "float32", product, narrow)) == f"b is rounded to {name}"
    assert said_of(*traces(seed, "float32", narrow, product)) == f"a is rounded to {name}"


NOT_ROUNDED: dict[str, Change] = {
    "fixed point": lambda x, w: np.round((x @ w) * 64) / 64,
    "bits cut off": lambda x, w: cut_off(x @ w),
    "another function too": lambda x, w: narrowed(x @ (w + 0.3 * np.cos(w))),
    "a row too": lambda x, w: narrowed(scaled(np.s_[:, 7])(x, w)),
    "rounded twice": lambda x, w: narrowed(narrowed(x @ w * 1.01) / 1.01),
}


@pytest.mark.parametrize("name", NOT_ROUNDED)
@one
@given(seed=st.integers(0, 99))
def test_what_has_few_bits_for_another_reason_is_not_called_rounded(name: str, seed: int) -> None:
    assert cause(*traces(seed, "float32", product, NOT_ROUNDED[name])) is None
