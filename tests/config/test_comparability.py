"""Which traces can be compared, what is said of how they line up, and which arithmetic their errors look like."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared_config.errors import UserError
from shared_config.parity.align import (
    check_comparable,
    common_names,
    differences_of_origin,
    execution_order,
    extent_notes,
    fed_hash,
    order_notes,
)
from shared_config.parity.compare import Row
from shared_config.parity.magnitude import COARSE, EVEN, _even, has_spare_bits, looks_rounded, magnitude_note
from shared_config.parity.measure import all_finite, dtype_of, estimate, first_true, floats, heatmap, measure, value_at
from shared_config.parity.numerics import (
    allowed_error,
    as_float64,
    difference,
    perturb,
    perturbation_delta,
    perturbation_maxima,
    worst_position,
)
from shared_config.parity.recording import Recording, delta_and_parts
from shared_config.parity.traces import Trace, TraceMeta, summarize, tensors_hash
from tests.config.test_report_golden import WITH_TRUTH, WITHOUT
from tests.golden import check_golden

CONFIG = "[model]\ndim = 20\nnorm_eps = 1e-5\n[train]\nseq_len = 8\ncompile_model = false\n"
META = TraceMeta("torch", "cpu", "float32", 3, CONFIG, weights_hash="ab" * 20, tokens_hash="cd" * 20)
ONE = {"loss": np.ones(())}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises((UserError, ValueError)) as caught:
        call()
    return str(caught.value)


DIFFERENCES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "seed": ({"seed": 4}, ["seed: 3 and 4"]),
    "weights": ({"weights_hash": "ef" * 20}, ["weights: other values (abababababab... and efefefefefef...)"]),
    "tokens": ({"tokens_hash": "ef" * 20}, ["tokens: other values (cdcdcdcdcdcd... and efefefefefef...)"]),
    "unknown": ({"tokens_hash": "", "weights_hash": "", "device": "x", "backend": "jax"}, []),
    "field": ({"config": CONFIG.replace("20", "24")}, ["model.dim: 20 and 24"]),
    "absent": ({"config": CONFIG.replace("norm_eps = 1e-5\n", "")}, ["model.norm_eps: 1e-05 and None"]),
    "more": ({"config": CONFIG + "[adapter]\nx = 1\n"}, ["adapter: None and {'x': 1}"]),
    "execution": ({"config": CONFIG.replace("false", "true")}, []),
    "all": (
        {"seed": 5, "config": CONFIG.replace("20", "24").replace("= 8", "= 9")},
        ["seed: 3 and 5", "model.dim: 20 and 24", "train.seq_len: 8 and 9"],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_difference_of_two_runs_is_named(name: str) -> None:
    fields, expected = DIFFERENCES[name]
    other = dataclasses.replace(META, **fields)
    assert list(differences_of_origin(META, other)) == expected
    pairs = [(Trace(ONE, META), Trace(ONE, other), None), (Trace(ONE, META), Trace(ONE, META), Trace(ONE, other))]
    for (a, b, truth), side in zip(pairs, ("b", "truth"), strict=True):
        if expected:
            said = "\n  ".join([f"trace a and trace {side} are not of the same run:", *expected])
            assert refusal(lambda a=a, b=b, truth=truth: check_comparable(a, b, truth)) == said
    check_comparable(Trace(ONE, META), Trace(ONE, META), Trace(ONE, dataclasses.replace(META, dtype="float64")))


def test_what_can_not_be_compared_is_refused_by_side() -> None:
    plain, odd = Trace(ONE, META), Trace(ONE, dataclasses.replace(META, dtype="float8"))
    empty, exact = Trace({}, META), Trace(ONE, dataclasses.replace(META, dtype="float64"))
    wrong = "dtype = 'float8': must be one of float64, float32, float16, bfloat16, fp8"
    assert refusal(lambda: check_comparable(odd, plain, None)) == f"trace a: {wrong}"
    assert refusal(lambda: check_comparable(plain, odd, exact)) == f"trace b: {wrong}"
    assert refusal(lambda: check_comparable(plain, plain, odd)) == f"trace truth: {wrong}"
    assert refusal(lambda: check_comparable(empty, plain, None)) == "trace a: has no tensors"
    assert refusal(lambda: check_comparable(plain, plain, plain)) == "the truth: dtype = 'float32': must be 'float64'"


def test_layers_that_were_fed_are_compared_with_what_fed_them() -> None:
    source = Trace({"forward/a": np.ones(2), "forward/b": np.zeros(2), **ONE}, META)
    fed = {"backend": "jax", "device": "tpu", "dtype": "float32", "modules": ["a", "b"], "own": ["layers.1", "c"]}
    fed["hash"] = fed_hash(source, ["b", "a"])
    again = Trace({"forward/a": np.ones(2), **ONE}, dataclasses.replace(META, refed=fed))
    other = Trace({"forward/a": np.ones(2), "forward/b": np.ones(2)}, META)
    assert fed["hash"] == tensors_hash({name: source.tensors[name] for name in ("forward/a", "forward/b")})
    assert fed_hash(Trace({"forward/a": np.ones(1)}, META), ["a"]) == tensors_hash({"forward/a": np.ones(1)})
    assert fed_hash(again, ["a", "b"]) == fed_hash(source, ["a", "c"]) == ""
    check_comparable(again, source, None)
    check_comparable(source, again, None)
    check_comparable(again, Trace(ONE, dataclasses.replace(META, refed=fed)), None)
    said = (
        "its layers were given what another trace (jax tpu float32) recorded: it can be compared with that trace, or "
    )
    said += "with one that was given the same"
    assert refusal(lambda: check_comparable(again, other, None)) == f"trace a: {said}"
    assert refusal(lambda: check_comparable(other, again, None)) == f"trace b: {said}"
    apart = Trace(ONE, dataclasses.replace(META, refed={**fed, "hash": "x"}))
    assert refusal(lambda: check_comparable(apart, again, None)) == f"trace a: {said}"
    assert list(extent_notes(again, source, "one", "two")) == [
        "one: its layers were given what jax tpu float32 recorded",
        "one: layers.1, c: not recorded there, passed on what they put out themselves",
    ]


def test_what_a_trace_was_not_to_hold_is_counted() -> None:
    names = [
        "forward/layers.0.mlp",
        "forward/layers.1.mlp",
        "forward/norm",
        "loss",
        "gradient/layers.1.mlp.w",
        "decode/x",
    ]
    whole = Trace({name: np.ones(1) for name in names}, META)

    def part(selection: dict[str, Any], kept: list[str], **fields: Any) -> Trace:
        meta = dataclasses.replace(META, selection=selection, **fields)
        return Trace({name: np.ones(1) for name in kept}, meta)

    layer = part({"layers": [1]}, ["forward/layers.1.mlp", "loss", "gradient/layers.1.mlp.w"])
    assert list(extent_notes(layer, whole, "p", "q")) == ["p: holds layers 1: 3 tensors of the other are not compared"]
    assert common_names(layer, whole) == ["forward/layers.1.mlp", "loss", "gradient/layers.1.mlp.w"]
    both = part({"layers": [0, 1], "only": ["gradient/*", "x"]}, ["gradient/layers.1.mlp.w"])
    assert list(extent_notes(whole, both, "p", "q")) == [
        "q: holds layers 0, 1; only gradient/*, x: 4 tensors of the other are not compared"
    ]
    assert common_names(both, whole) == ["loss", "gradient/layers.1.mlp.w"]
    fed = {"backend": "torch", "device": "cpu", "dtype": "float64", "own": []}
    refed = part({}, names[:4], refed=fed)
    assert list(extent_notes(refed, whole, "p", "q")) == [
        "p: its layers were given what torch cpu float64 recorded",
        "p: holds forward, routes and loss, as its layers were given recorded inputs: 2 tensors of the other are not "
        "compared",
    ]
    assert list(extent_notes(whole, part({}, names[:2]), "p", "q")) == []  # missing, not left out
    assert common_names(whole, part({}, names[:2])) == execution_order(whole, whole)


def test_tensors_stand_where_their_modules_do() -> None:
    names = ["forward/b", "forward/layers.0.mlp", "forward/layers.0", "forward/norm"]
    late = ["updated/norm.weight", "updated/b.w", "gradient/b.w", "gradient/norm.weight", "gradient/layers.0.mlp.up.w"]
    late += ["gradient/x.w", "gradient/layers.0.z.w", "other/x", "losses", "decode/1", "loss", "routing/zz.indices"]
    late += ["routing/layers.0.mlp.router.indices", "routing/norm.y", "initial weights"]
    expected = ["initial weights", "forward/b", "routing/layers.0.mlp.router.indices", "forward/layers.0.mlp"]
    expected += ["forward/layers.0", "routing/norm.y", "forward/norm", "routing/zz.indices", "loss", "decode/1"]
    expected += ["gradient/x.w", "gradient/norm.weight", "gradient/layers.0.z.w", "gradient/layers.0.mlp.up.w"]
    expected += ["gradient/b.w", "updated/norm.weight", "updated/b.w", "losses", "other/x"]
    a, b = ({name: np.ones(1) for name in each} for each in ([*names, *late], names[:2]))
    assert execution_order(Trace(a, META), Trace(b, META)) == expected
    c = {name: np.ones(1) for name in ("forward/layers.0", "forward/b", "forward/own", "forward/layers.0.mlp")}
    assert list(order_notes(Trace(a, META), Trace(c, META), "p", "q")) == [
        "executed in different order: p has forward/b where q has forward/layers.0"
    ]
    assert list(order_notes(Trace(a, META), Trace(b, META), "p", "q")) == []


# Which arithmetic


def forward(count: int, sizes: float | list[float], **fields: Any) -> list[Row]:
    """Rows of a forward pass whose errors have these sizes, in roundoffs of float32's deltas."""
    each = sizes if isinstance(sizes, list) else [sizes] * count
    names = ["forward/token_embedding", *(f"forward/layers.{i}.proj1" for i in range(count - 1))]
    rows = [Row(name, "forward", "differs", error=size, delta=1.0, limit=1.0, scale=4.0) for name, size in
            zip(names, each, strict=True)]  # fmt: skip
    return [dataclasses.replace(rows[0], status="within", error=0.0, **fields), *rows[1:]]


RNG = np.random.default_rng(0)
A = (RNG.uniform(0.5, 1.5, (12, 40)) * RNG.choice([-1, 1], (12, 40))).astype(np.float32)
NOISE = RNG.uniform(-1, 1, (12, 40)).astype(np.float32)
ROW = np.ones((12, 1)) * RNG.uniform(-1, 1, (1, 40))
B = A + np.float32(2e-3) * NOISE


def note(rows: list[Row], a: Any = A, b: Any = B, dtype: str = "float32") -> str:
    name = next((row.name for row in rows if not row.ok), "forward/x")
    return magnitude_note(rows, Trace({name: a}, META), Trace({name: b}, META), dtype)


BF16 = "(2^-8, where float32 leaves 2^-24): something may be computed or stored in bfloat16 on one side"
TF32 = (
    "(2^-11, where float32 leaves 2^-24): train.matmul_precision, or NVIDIA_TF32_OVERRIDE, may differ between the two"
)


@pytest.mark.parametrize(
    ("size", "said"),
    [(2**16, BF16), (2**17.49, BF16), (2**17.51, ""), (2**14.51, BF16), (2**14.49, TF32), (2**11.51, TF32),
     (2**11.49, "")],
)  # fmt: skip
def test_arithmetic_is_told_by_the_size_of_errors(size: float, said: str) -> None:
    share = f"forward/layers.0.proj1: the relative error, {size / 4:.1e}, is of the size that "
    name = "bfloat16" if said == BF16 else "TF32"
    assert note(forward(6, size)) == (f"{share}{name} leaves {said}" if said else "")
    without = [dataclasses.replace(row, delta=None, scale=2.0**24) for row in forward(6, size)]
    assert (name in note(without)) == bool(said)
    zero = [dataclasses.replace(row, delta=0.0, scale=2.0**24) for row in forward(6, size)]
    assert (name in note(zero)) == bool(said)


def test_errors_must_begin_at_the_first_product_and_keep_their_size() -> None:
    big = 2.0**16
    assert note(forward(6, big))
    assert note(forward(6, [0.0, big, 1.0, big, big, big]))  # four of five
    assert not note(forward(6, [0.0, big, 1.0, big, big, 1.0]))
    assert not note(forward(6, [0.0, 1.0, big, big, big, big]))
    assert not note(forward(6, big), dtype="bfloat16")
    assert not note([dataclasses.replace(row, group="gradient") for row in forward(6, big)])
    assert not note(forward(6, 0.0)[:1])
    later = forward(6, big)
    later[0] = dataclasses.replace(later[0], name="forward/gate")
    assert not note(later)  # a product before it is right
    for name in ("proj", "k_proj", "proj2", "gate", "output_head", "patch_embedding"):
        rows = forward(6, big)
        rows[1] = dataclasses.replace(rows[1], name=f"forward/{name}")
        assert note(rows), name
    for name in ("proj12", "projx", "mlp", "gate.x"):
        rows = forward(6, big)
        rows[1] = dataclasses.replace(rows[1], name=f"forward/{name}")
        assert not note(rows), name
    rows = forward(6, big)
    rows[1] = dataclasses.replace(rows[1], status="missing in a")
    assert not note(rows)
    assert not magnitude_note(forward(6, big), Trace({}, META), Trace({}, META), "float32")
    gap = A.copy()
    gap[0, 0] = np.nan
    assert not note(forward(6, big), a=gap, b=gap)
    assert not note(forward(6, big), b=gap)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 values without their last bits."""
    return (values.view(np.uint32) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


def test_arithmetic_is_told_by_bits_that_are_lacking() -> None:
    any_size = forward(6, 3.0)
    any_size[1] = dataclasses.replace(any_size[1], name="forward/x")
    for bits, said in ((16, BF16), (13, TF32), (15, ""), (14, ""), (12, "")):
        for pair in ((A, rounded(A, bits)), (rounded(A, bits), A)):
            assert note(any_size, *pair).endswith(said)
            assert bool(note(any_size, *pair)) == bool(said)
    assert not note(any_size, rounded(A, 16), rounded(A, 16))
    assert not note(any_size, A, rounded(A, 16) * np.float32(1 + 2**-6))
    for bits in (0, 1, 13, 16):
        assert has_spare_bits(rounded(A, bits), bits)
        assert not has_spare_bits(rounded(A, bits), bits + 1)
    assert not has_spare_bits(np.zeros(3), 5)
    assert [(name, coarse.roundoff, coarse.spare_bits) for name, coarse in COARSE.items()] == [
        ("bfloat16", 2**-8, 16), ("TF32", 2**-11, 13)]  # fmt: skip


def uneven(factor: float, axis: int) -> np.ndarray:
    """Errors of one row, or column, this many times those of the others."""
    sizes = np.linalg.norm(NOISE, axis=1 - axis, keepdims=True)
    error = NOISE / sizes * (np.linalg.norm(A, axis=1, keepdims=True) if axis == 0 else 1)
    error[(3, slice(None)) if axis == 0 else (slice(None), 3)] *= factor
    return error


@pytest.mark.parametrize(
    ("error", "looks"),
    [
        (NOISE, True), (A, False), (ROW, False), (0.25 * A + NOISE, True), (0.4 * A + NOISE, False),
        (uneven(6.5, 1), True), (uneven(9.0, 1), False), (uneven(1 / 9.0, 1), False), (uneven(1 / 6.5, 1), True),
        (uneven(6.5, 0), True), (uneven(9.0, 0), False), (uneven(1 / 9.0, 0), False), (uneven(1 / 6.5, 0), True),
        (uneven(0.0, 0), False), (0.8 * ROW + NOISE, True), (1.3 * ROW + NOISE, False),
    ],
)  # fmt: skip
def test_errors_of_rounding_are_spread_and_follow_nothing(error: np.ndarray, looks: bool) -> None:
    a = A.astype(np.float64)
    assert looks_rounded(a, a + 1e-4 * error) == looks
    assert looks_rounded(a.reshape(3, 4, 40), (a + 1e-4 * error).reshape(3, 4, 40)) == looks


def test_on_few_rows_or_columns_nothing_can_be_told() -> None:
    a = A.astype(np.float64)
    b = a + 1e-4 * NOISE
    assert looks_rounded(a[:4], b[:4])
    assert not looks_rounded(a[:3], b[:3])
    assert not looks_rounded(a[:, :3], b[:, :3])
    assert not looks_rounded(np.ones(()), np.ones(()) * 2)
    padded, other = (np.concatenate([each, np.zeros((20, 40))]) for each in (a, b))
    assert looks_rounded(padded, other)  # rows of zeros say nothing
    again = np.concatenate([a, a[:1], a[:1], a[:1]]), np.concatenate([b, b[:1], b[:1], b[:1]])
    assert looks_rounded(*again)  # nor do rows that stand twice


# Distances


def test_distances_of_tensors_and_their_summaries() -> None:
    a = np.random.default_rng(3).standard_normal((40, 7))
    b = a.copy()
    b[3, 2] += 0.5
    found = measure(b, a)
    assert (found.position, found.mismatched, found.estimated) == ((3, 2), 0, False)
    assert found.error == pytest.approx(0.5 / 280**0.5)
    assert found.scale == pytest.approx(np.sqrt(np.mean(a**2)))
    guess = measure(summarize(b), a)
    assert (guess.position, guess.mismatched, guess.estimated) == (None, 0, True)
    assert guess.error == pytest.approx(found.error)  # one place falls into one bucket
    assert guess.scale == pytest.approx(found.scale)
    same = measure(a, summarize(a))
    assert (same.error, same.estimated) == (0.0, True)
    hidden = dataclasses.replace(summarize(a), hash="other")
    assert estimate(hidden, summarize(a)).error == np.finfo(np.float64).tiny
    assert estimate(dataclasses.replace(hidden, dtype="float32"), summarize(a)).error == 0.0
    gap = np.where(np.arange(7) == 1, np.nan, a)
    unequal = estimate(summarize(gap), summarize(a))
    assert (unequal.error, unequal.mismatched, unequal.position) == (np.inf, 1, None)
    empty = summarize(np.zeros((0, 3)))
    assert (estimate(empty, empty).error, empty.size, empty.mean, empty.minimum, empty.maximum) == (0, 0, 0, 0, 0)
    assert [all_finite(each) for each in (a, gap, summarize(a), summarize(gap))] == [True, False, True, False]
    assert [floats(each) for each in (a, np.arange(3), summarize(a), summarize(np.arange(3)))] == [True, False] * 2
    assert [dtype_of(each) for each in (a, summarize(np.arange(3, dtype=np.int16)))] == ["float64", "int16"]
    assert first_true(a == a[5, 1]) == (5, 1)
    assert value_at(a, (5, 1)) == a[5, 1]
    assert type(value_at(np.arange(3), (2,))) is float
    assert value_at(summarize(a), (0, 0)) is value_at(None, (0,)) is value_at(a, None) is None
    assert value_at(a[:0], (0, 0)) is None


def test_blocks_of_a_heat_map_are_of_equal_length() -> None:
    for rows, columns in ((48, 96), (47, 95), (49, 97), (100, 200), (1, 1)):
        a = np.random.default_rng(rows).standard_normal((rows, columns))
        row_starts = [int(i * rows / min(rows, 48)) for i in range(min(rows, 48))] + [rows]
        column_starts = [int(i * columns / min(columns, 96)) for i in range(min(columns, 96))] + [columns]
        blocks = [list(itertools.pairwise(starts)) for starts in (row_starts, column_starts)]
        expected = [[np.abs(a[r:s, c:d]).max() for c, d in blocks[1]] for r, s in blocks[0]]
        found = heatmap(a, np.zeros_like(a))
        assert found.shape == (rows, columns)
        np.testing.assert_array_equal(np.array(found.values), expected)
    assert heatmap(np.ones(()), np.zeros(())).values == ((1.0,),)
    assert heatmap(np.full((2, 1, 2), np.inf), np.full((2, 1, 2), np.inf)).values == ((0.0, 0.0),) * 2
    odd = heatmap(np.array([np.nan, np.nan, 1.0, np.inf]), np.array([np.nan, 1.0, np.nan, -np.inf])).values
    assert odd == ((0.0, np.inf, np.inf, np.inf),)


def test_differences_say_where_and_how_much() -> None:
    value, truth = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 2.0], [4.0, 4.0]])
    found = difference(value, truth)
    assert dataclasses.astuple(found) == (pytest.approx((2 / 37) ** 0.5), pytest.approx(0.5**0.5),
                                          pytest.approx((37 / 4) ** 0.5), 1.0, (1, 0), 3.0, 4.0, 0)  # fmt: skip
    assert found.where() == "at (1, 0): 3.0 against 4.0 (off by 1.000e+00)"
    assert worst_position(np.array([0.0, -3.0, 2.0]), np.zeros(3)) == (1,)
    gap = difference(np.array([1.0, np.inf, np.nan]), np.array([2.0, -np.inf, 1.0]))
    assert (gap.mismatched, gap.index, gap.max_error, gap.rms_error) == (2, (1,), np.inf, np.inf)
    assert gap.truth_rms == pytest.approx(2.5**0.5)
    assert difference(np.array([np.inf, 1.0]), np.array([np.inf, 1.0])).relative_error == 0
    empty = difference(np.zeros((0, 2)), np.zeros((0, 2)))
    assert dataclasses.astuple(empty) == (0, 0, 0, 0, (0, 0), 0, 0, 0)
    assert difference([1.0], [0.0]).relative_error == np.inf
    assert refusal(lambda: difference(np.ones(2), 1j * np.ones(2))) == "dtype = complex128: must be a real dtype"
    assert refusal(lambda: difference(np.ones(2), np.ones(3))) == "shape = (2,): must be that of the truth, (3,)"
    assert refusal(lambda: as_float64(np.ones(2, complex))) == "dtype = complex128: must be a real dtype"
    assert allowed_error([3.0, np.inf, 4.0], 0.0, 10, 2.0**-8) == pytest.approx(4 * 2.0**-8 * 12.5**0.5)
    assert allowed_error([3.0, 4.0], 1.0, 10, 2.0**-8) == 10


def test_weights_are_moved_in_the_order_of_their_names() -> None:
    weights = {"b": np.ones(3, np.float32), "a": np.full((2, 2), 2.0), "n": np.arange(3)}
    moved = perturb(weights, 0.25, np.random.default_rng(1))
    draws = np.random.default_rng(1)
    for name in ("a", "b"):
        np.testing.assert_array_equal(
            moved[name], weights[name] * (1 + 0.25 * draws.uniform(-1, 1, weights[name].shape))
        )
    assert list(moved) == ["b", "a", "n"]
    assert moved["n"] is weights["n"]
    runs: list[float] = []

    def noted(name: str, value: Any, truth: Any) -> list[float]:
        runs.append(float(value - truth))
        return [runs[-1], 1.0]

    maxima = perturbation_maxima(lambda given: float(given["b"].sum()), weights, 0.25, noted)
    assert len(runs) == 3
    assert maxima["output"].tolist() == [max(0.0, *runs), 1.0]
    assert perturbation_delta(lambda given: given["b"], weights, 0.25, runs=2, seed=5).keys() == {"output"}
    (first,) = perturbation_delta(lambda given: given["b"], weights, 0.25, runs=1, seed=5).values()
    expected = perturb(weights, 0.25, np.random.default_rng(5))["b"] - 1
    assert first == pytest.approx(np.sqrt(np.mean(expected**2)))


def test_recorded_tensors_are_named_in_the_order_of_execution() -> None:
    one = np.ones(1)
    names = Recording(one, {"b": one, "a": one}, {"r.indices": one}, {"w": one}, {"w": one}, {"whole": one}).tensors()
    assert list(names) == [
        "forward/b",
        "forward/a",
        "routing/r.indices",
        "loss",
        "gradient/w",
        "updated/w",
        "decode/whole",
    ]
    assert delta_and_parts("x", np.array([3.0]), np.array([1.0])).tolist() == [2.0]
    moved = delta_and_parts("x", np.array([3.0, 1.0, np.nan]), np.array([1.0, 1.0, np.nan]))
    assert moved == pytest.approx([2**0.5, (2 / 3) ** 0.5, 1.0, 2.0, 0.0, 0.0])


def test_a_comparison_as_json() -> None:
    contents = [found.to_json() for found in (WITH_TRUTH, dataclasses.replace(WITHOUT, rows=WITHOUT.rows[:2]))]
    check_golden("comparisons.json", json.dumps(contents, indent=1, allow_nan=False) + "\n")


@pytest.mark.parametrize("sizes", [(1.0, 1.0, EVEN), (1.0, EVEN, EVEN)])
def test_errors_that_differ_by_the_limit_are_uneven(sizes: tuple[float, ...]) -> None:
    """Either way from the median; below it they are even."""
    assert not _even(np.array(sizes))
    assert _even(np.minimum(sizes, 0.99 * EVEN))
