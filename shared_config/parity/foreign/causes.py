"""What made two tensors differ: a cause is named only where undoing it, and it alone, makes them the same.

Each check proposes a correction of the one, and holds what is left to the limit of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from shared_config.parity.foreign.containers import INPUT
from shared_config.parity.numerics import as_float64, rms
from shared_config.parity.result import DIFFERS, Row
from shared_config.parity.traces import FORWARD, Trace, group_of

SLACK = 2.0
"""What is left after a correction may be this many limits: the correction itself is fitted."""
PART = 0.1
"""A correction that leaves more than this share of the error explains nothing, whatever the limit says."""
CLEAR = 4.0
"""Errors of a part are at least this many times those of the rest, or the rest has them, too."""
SURE = 4.0
"""Standard errors by which a fitted number must be away from another one."""
MOST = 0.75
"""Share of the values that rounding gives exactly; cutting off the bits gives half of them."""
NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PLACES = ("row", "head", "position")
"""Kinds that say where an error is, and not why."""
LARGEST = 1 << 24
"""Elements of a tensor that is looked at."""
PLAIN_FACTORS = {math.sqrt(number): f"sqrt({number})" for number in (2, 3, 6, 7, 8, 10, 12, 32, 64, 80, 96, 128, 256)}


@dataclass(frozen=True)
class Cause:
    """Why two tensors differ.

    Attributes:
        kind: "factor", "row", "head", "position", "shift", "swap", "transposed weight", "eps" or "dtype".
        text: in words.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Pair:
    """Two tensors that differ, what went in, and what is allowed."""

    a: np.ndarray
    b: np.ndarray
    limit: float
    given: np.ndarray | None

    def explained(self, corrected: np.ndarray) -> bool:
        """Whether what is left of the difference is within the limit, and a small part of what it was."""
        left, was = rms(corrected - self.a), rms(self.b - self.a)
        return left <= SLACK * self.limit and left <= max(PART * was, np.finfo(np.float64).tiny)


def cause_of(row: Row, a: Trace, b: Trace, order: Sequence[str]) -> Cause | None:
    """The cause of a difference, if a check confirms one.

    Args:
        order: names of both, in the order of execution.
    """
    values = [trace.tensors.get(row.name) for trace in (a, b)]
    if row.status != DIFFERS or not all(isinstance(value, np.ndarray) for value in values):
        return None
    whole_a, whole_b = (as_float64(value) for value in values)  # type: ignore[arg-type]
    if not (np.isfinite(whole_a).all() and np.isfinite(whole_b).all()) or not whole_a.size or whole_a.size > LARGEST:
        return None
    pair = Pair(whole_a, whole_b, row.limit, _given(row.name, a, order))
    near_one = _near_one(pair)
    for check in CHECKS:
        found = check(near_one)
        if found is not None:
            return found
    return narrow_dtype(pair, *(value.dtype.name for value in values))  # type: ignore[union-attr]


def _near_one(pair: Pair) -> Pair:
    """Both sides over a power of two, so that squares of their numbers neither overflow nor vanish."""
    _, exponent = np.frexp(max(np.abs(pair.a).max(), np.abs(pair.b).max()))
    a, b, limit = (np.ldexp(each, -exponent) for each in (pair.a, pair.b, pair.limit))
    return Pair(a, b, float(limit), pair.given)


def factor(pair: Pair) -> Cause | None:
    """One side is the other times a number."""
    norm = float(np.sum(np.square(pair.a)))
    scale = float(np.sum(pair.a * pair.b)) / norm if norm else 0.0
    if not scale or scale == 1 or not pair.explained(pair.b / scale):
        return None
    return Cause("factor", f"a constant factor: b is {_number(scale)} times a")


def eps(pair: Pair) -> Cause | None:
    """Rows differ in length as those of a norm with another eps do: (mean of squares + eps) differs by a constant.

    Of RMSNorm (arXiv:1910.07467) the squared ratio of two rows is (m + e_a) / (m + e_b), where m is the mean of
    squares of what was given, or its variance for LayerNorm (arXiv:1607.06450).
    """
    if pair.given is None or pair.given.shape != pair.a.shape or pair.a.ndim < 2:
        return None
    size_a, size_b = (np.linalg.norm(side.reshape(-1, side.shape[-1]), axis=1) for side in (pair.a, pair.b))
    if not (size_a.all() and size_b.all()) or len(size_a) < 3:
        return None
    given = pair.given.reshape(-1, pair.given.shape[-1])
    squared = np.square(size_b / size_a)
    for moment in (np.mean(np.square(given), axis=1), np.var(given, axis=1)):
        table = np.stack([np.ones_like(squared), -squared], axis=1)
        found, *_ = np.linalg.lstsq(table, moment * (squared - 1), rcond=None)
        left = table @ found - moment * (squared - 1)
        spread = np.sqrt(np.diag(np.linalg.pinv(table.T @ table)) * np.sum(left * left) / max(1, len(left) - 2))
        eps_a, eps_b = (max(0.0, float(value)) for value in found)
        if abs(eps_a - eps_b) <= SURE * float(spread.max()):
            continue
        ratio = np.sqrt((moment + eps_b) / (moment + eps_a)).reshape(*pair.a.shape[:-1], 1)
        if pair.explained(pair.b * ratio):
            known = zip((eps_a, eps_b), SURE * spread, strict=True)
            words = [f"{value:.2g}" if value > unsure else f"less than {value + unsure:.0e}" for value, unsure in known]
            return Cause("eps", f"another eps of a norm: {words[0]} in a, {words[1]} in b")
    return None


def transposed_weight(pair: Pair) -> Cause | None:
    """One side multiplied with the transpose of the other's square weight, as both are seen in what came out."""
    if pair.given is None or pair.given.ndim < 2 or pair.given.shape != pair.a.shape:
        return None
    width = pair.given.shape[-1]
    rows = pair.given.reshape(-1, width)
    if len(rows) < width or np.linalg.matrix_rank(rows) < width:
        return None
    weight_a, *_ = np.linalg.lstsq(rows, pair.a.reshape(-1, width), rcond=None)
    moved = (rows @ weight_a.T).reshape(pair.b.shape)
    if not pair.explained(pair.b - moved + pair.a):
        return None
    return Cause(
        "transposed weight", "a transposed weight: b is what the transpose of a's weight makes of the same input"
    )


def swap(pair: Pair) -> Cause | None:
    """Two parts of an axis have changed places, or its order is another one that is known."""
    for axis in range(pair.a.ndim)[::-1]:
        size = pair.a.shape[axis]
        for text, order in _orders(size, pair, axis):
            if pair.explained(np.take(pair.b, order, axis)):
                return Cause("swap", f"another order along axis {axis}: {text}")
    return None


def shift(pair: Pair) -> Cause | None:
    """One side is the other, moved by one or two places along an axis."""
    for axis in range(pair.a.ndim):
        size = pair.a.shape[axis]
        for places in (1, -1, 2, -2):
            if size - abs(places) < 2:
                continue
            kept_a = np.take(pair.a, range(max(0, -places), size - max(0, places)), axis)
            kept_b = np.take(pair.b, range(max(0, places), size - max(0, -places)), axis)
            cut = Pair(kept_a, kept_b, pair.limit, None)
            left, was = rms(kept_b - kept_a), rms(pair.b - pair.a)
            if left <= SLACK * cut.limit and left <= PART * was:
                return Cause(
                    "shift", f"off by {abs(places)} along axis {axis}: b is {'behind' if places > 0 else 'ahead'}"
                )
    return None


def part(pair: Pair) -> Cause | None:
    """All of the error is in one row, in one head, or from one position on."""
    error = np.abs(pair.b - pair.a)
    for axis in range(pair.a.ndim):
        size = pair.a.shape[axis]
        along = np.sqrt(np.mean(np.square(np.moveaxis(error, axis, 0).reshape(size, -1)), axis=1))
        bad = np.flatnonzero(along > pair.limit)
        if not bad.size or bad.size == size or along[bad].min() < CLEAR * np.delete(along, bad).max():
            continue
        first, last = int(bad[0]), int(bad[-1])
        corrected = np.array(pair.b)
        place = [slice(None)] * pair.a.ndim
        place[axis] = slice(first, last + 1)
        corrected[tuple(place)] = pair.a[tuple(place)]
        if not pair.explained(corrected):
            continue
        if first == last:
            return Cause("row", f"all of it at {first} of axis {axis}, of {size}")
        block = last - first + 1
        if axis == pair.a.ndim - 1 and size % block == 0 and first % block == 0 and bad.size == block:
            return Cause(
                "head", f"all of it in block {first // block} of {size // block} of the last axis, {block} wide"
            )
        if last == size - 1 and bad.size == block and axis < pair.a.ndim - 1:
            return Cause("position", f"all of it from {first} on along axis {axis}, of {size}")
    return None


CHECKS: tuple[Callable[[Pair], Cause | None], ...] = (factor, part, shift, swap, eps, transposed_weight)


def narrow_dtype(pair: Pair, dtype_a: str, dtype_b: str) -> Cause | None:
    """One side has no more bits than a narrower dtype, and rounding the other to it makes them the same."""
    for name, dtype in NARROW.items():
        if name in (dtype_a, dtype_b):
            continue
        narrow_a, narrow_b = (bool(np.all(side.astype(dtype).astype(np.float64) == side)) for side in (pair.a, pair.b))
        if narrow_a == narrow_b:
            continue
        narrow, wide = (pair.a, pair.b) if narrow_a else (pair.b, pair.a)
        gap = np.abs(wide.astype(dtype).astype(np.float64) - narrow)
        ulp = np.abs(narrow) * float(ml_dtypes.finfo(dtype).eps)
        if np.all(gap <= ulp) and np.mean(gap == 0) > MOST:
            return Cause("dtype", f"{'a' if narrow_a else 'b'} is rounded to {name}")
    return None


def _orders(size: int, pair: Pair, axis: int) -> Iterator[tuple[str, np.ndarray]]:
    """Orders that are known to be confused, and the exchange of the two places that differ."""
    every = np.arange(size)
    error = np.mean(np.square(np.moveaxis(pair.b - pair.a, axis, 0).reshape(size, -1)), axis=1)
    bad = np.flatnonzero(np.sqrt(error) > SLACK * pair.limit)
    if len(bad) == 2:
        order = every.copy()
        order[bad] = bad[::-1]
        yield f"{bad[0]} and {bad[1]} are exchanged", order
    yield "turned round", every[::-1]
    for parts in range(2, min(size, 65)):
        if size % parts:
            continue
        blocks = every.reshape(parts, -1)
        yield f"blocks for places, {parts} blocks", blocks.T.ravel()
        if blocks.shape[1] % 2 == 0 and parts > 1:
            halves = blocks.reshape(parts, 2, -1)
            yield f"halves exchanged in {parts} blocks", halves[:, ::-1].ravel()
            yield f"halves for pairs in {parts} blocks", halves.transpose(0, 2, 1).ravel()
            yield f"pairs for halves in {parts} blocks", blocks.reshape(parts, -1, 2).transpose(0, 2, 1).ravel()
        if len(bad) and len(bad) % (size // parts) == 0 and len(bad) // (size // parts) == 2:
            first, second = sorted({int(place) // (size // parts) for place in bad})[:2]
            order = blocks.copy()
            order[[first, second]] = order[[second, first]]
            yield f"blocks {first} and {second} of {parts} are exchanged", order.ravel()


def _given(name: str, a: Trace, order: Sequence[str]) -> np.ndarray | None:
    """What a module of the first side was given: its recorded input, or else the last output of its shape before it."""
    if group_of(name) != FORWARD or INPUT in name:
        return None
    named = f"{name}{INPUT}"
    before = [other for other in order[: order.index(name)] if group_of(other) == FORWARD]
    candidates = [named] if named in before else before[::-1]
    for other in candidates:
        value = a.tensors.get(other)
        if isinstance(value, np.ndarray) and value.shape == getattr(a.tensors[name], "shape", None):
            return as_float64(value)
    return None


def _number(scale: float) -> str:
    for value, text in PLAIN_FACTORS.items():
        if abs(scale / value - 1) < 1e-3:
            return text
        if abs(scale * value - 1) < 1e-3:
            return f"1/{text}"
    return f"{scale:.5g}"
