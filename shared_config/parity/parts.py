"""Rows, columns and elements of a tensor, and the size of the whole: what hides in the RMS of a large tensor.

    row      all along the last axis: what one token has, or what one output of a matrix is made of
    column   all along the axis of tokens, or along the first of a matrix: what one feature is over all tokens
    element  one number
    scale    the whole along its reference: a wrong factor, which adds up where rounding averages out

Each is held to its own delta, measured with the tensor's (`part_errors` of what rounding the weights changes), or a
share of the tensor's where that is more: over a few runs, a small part may move too little by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shared_config.parity.numerics import rms

ROW, COLUMN, ELEMENT, SCALE = "row", "column", "element", "scale"

OF_SIZE, OF_DELTA = 0.5, 0.25
"""A part's delta is at least this share of what the tensor's is at the size of the part, and of the tensor's itself."""
OF_RMS = 0.25
"""Roundoffs are those of the part, or of this share of the tensor's RMS."""
OF_ELEMENTS = 0.5
"""An element of a vector moves by at least this share of the tensor's delta."""
MOSTLY = 0.9
"""Share of an error that lies along the reference, from which on it is a factor."""
SINGLE = 2.0
"""Roundings of one number may all be as large as they can be; in an RMS they are not."""


@dataclass(frozen=True)
class PartErrors:
    """How far the parts of a tensor are from a reference.

    Attributes:
        size: RMS of what the errors are relative to: the reference, or of an update, the step.
        scale: share of the reference that the error is along it.
        rows: RMS of each row; of a vector, each element.
        columns: RMS of each column; empty for a vector.
    """

    size: float
    scale: float
    rows: np.ndarray
    columns: np.ndarray

    def packed(self) -> np.ndarray:
        """All numbers in a row, as they are kept in a file: float64."""
        return np.concatenate([[self.size, self.scale], self.rows.ravel(), self.columns.ravel()])


@dataclass(frozen=True)
class PartLimits:
    """What is allowed to the parts of one tensor.

    Attributes:
        row, element, scale: multiples of the part's delta.
        relative: share of the part's size that is always allowed.
        absolute: RMS error that is always allowed.
        of_steps: whether the tensor is a parameter whose deltas are those of a step, which is not known place by place.
    """

    row: float
    element: float
    scale: float
    relative: float = 0.0
    absolute: float = 0.0
    of_steps: bool = False


@dataclass(frozen=True)
class Part:
    """The part of a tensor that is nearest to its limit, or beyond: see `worst_part`.

    Attributes:
        kind: "row", "column", "element" or "scale".
        index: of the tensor, None at the axis that the part lies along; () for "scale".
        error, limit, size: RMS of the part's error, of what is allowed, and of the part; of "scale" relative, size 1.
        position: of the largest error within it.
        beyond, count: how many parts of the kind are beyond their limits, of how many.
    """

    kind: str
    index: tuple[int | None, ...]
    error: float
    limit: float
    size: float
    position: tuple[int, ...]
    beyond: int
    count: int

    @property
    def share(self) -> float:
        """Error as a share of the limit: above 1 is a difference."""
        return self.error / self.limit if self.limit else (0.0 if self.error == 0 else math.inf)

    @property
    def label(self) -> str:
        """As in "row 17"; with several indices, those of all other axes, as in "column 1,7"."""
        places = ",".join(str(i) for i in self.index if i is not None)
        return f"{self.kind} {places}".rstrip()


def part_errors(error: np.ndarray, reference: np.ndarray) -> PartErrors:
    """How far each part is off.

    Args:
        error: float64, finite, of one axis or more.
        reference: float64, finite, of the same shape.
    """
    rows = np.abs(error) if error.ndim == 1 else _rms(error, -1)
    columns = np.empty(0) if error.ndim == 1 else _rms(error, _along(error.ndim))
    return PartErrors(rms(reference), abs(_along_reference(error, reference)), rows, columns)


def unpacked(numbers: np.ndarray, shape: tuple[int, ...]) -> PartErrors:
    """The inverse of `PartErrors.packed` for a tensor of this shape.

    Raises:
        ValueError: if there are more or fewer numbers than such a tensor has.
    """
    rows, columns = _shapes(shape)
    sizes = math.prod(rows), math.prod(columns)
    if numbers.shape != (2 + sum(sizes),):
        raise ValueError(f"{numbers.size} numbers: must be {2 + sum(sizes)} for shape {shape}")
    return PartErrors(
        float(numbers[0]),
        float(numbers[1]),
        numbers[2 : 2 + sizes[0]].reshape(rows),
        numbers[2 + sizes[0] :].reshape(columns),
    )


def only_scale(size: float, scale: float, delta: float, shape: tuple[int, ...]) -> np.ndarray:
    """`PartErrors.packed` of a tensor of this shape of which no more than size and scale are known: each row and column
    may hold all that moved.

    Args:
        delta: RMS of what moved.
    """
    lines = [np.full(count, delta * math.sqrt(math.prod(count))) for count in _shapes(shape)]
    return PartErrors(size, scale, *lines).packed()


def has_parts(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has parts other than itself."""
    return math.prod(shape) > 1


def worst_part(error: np.ndarray, reference: np.ndarray, deltas: PartErrors, delta: float, limits: PartLimits) -> Part:
    """The part with the largest share of its limit; of those beyond, what says most.

    That is a factor where the error is one, the only element beyond, and else the worst row or column.

    Args:
        error, reference: as for `part_errors`.
        deltas: what rounding the weights does to the parts.
        delta: what it does to the tensor.
    """
    parts = list(_parts(error, reference, deltas, delta, limits))
    beyond = [part for part in parts if part.share > 1]
    along = next((part for part in beyond if part.kind == SCALE), None)
    if along is not None and along.error * rms(reference) >= MOSTLY * rms(error):
        return along
    lone = next((part for part in beyond if part.kind == ELEMENT and part.beyond == 1), None)
    if lone is not None:
        return lone
    lines = [part for part in beyond if part.kind in (ROW, COLUMN)]
    return max(lines or parts, key=lambda part: part.share)


def _parts(
    error: np.ndarray, reference: np.ndarray, deltas: PartErrors, delta: float, limits: PartLimits
) -> Iterator[Part]:
    """The worst of each kind."""
    found, size = part_errors(error, reference), rms(reference)
    rate = 0.0 if limits.of_steps or not size else delta / size
    floor = np.maximum(SINGLE * limits.relative * np.maximum(np.abs(reference), OF_RMS * size), limits.absolute)
    if error.ndim == 1:
        element_deltas = np.maximum(deltas.rows, OF_ELEMENTS * delta)
    else:
        own = part_errors(reference, reference)
        moved = [
            np.maximum.reduce([part, OF_SIZE * rate * part_size, np.full_like(part, OF_DELTA * delta)])
            for part, part_size in ((deltas.rows, own.rows), (deltas.columns, own.columns))
        ]
        axes = (error.ndim - 1, _along(error.ndim))
        kinds = zip((ROW, COLUMN), axes, (found.rows, found.columns), (own.rows, own.columns), moved, strict=True)
        for kind, axis, errors, sizes, part_deltas in kinds:
            allowed = np.maximum(limits.relative * np.maximum(sizes, OF_RMS * size), limits.absolute)
            yield _worst(kind, axis, errors, np.maximum(limits.row * part_deltas, allowed), sizes, error)
        element_deltas = np.maximum(*(np.expand_dims(part, axis) for part, axis in zip(moved, axes, strict=True)))
    allowed = np.maximum(limits.element * element_deltas, floor)
    yield _worst(ELEMENT, None, np.abs(error), allowed, np.abs(reference), error)
    if rate:
        bound = max(limits.scale * max(deltas.scale, rate / math.sqrt(error.size)), limits.relative)
        bound = max(bound, limits.absolute / size)
        largest = _position(np.abs(error))
        yield Part(SCALE, (), found.scale, bound, 1.0, largest, int(found.scale > bound), 1)


def _worst(
    kind: str, axis: int | None, errors: np.ndarray, limits: np.ndarray, sizes: np.ndarray, error: np.ndarray
) -> Part:
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(errors == 0, 0.0, errors / limits)
    place = _position(shares)
    index: tuple[int | None, ...] = place if axis is None else (*place[:axis], None, *place[axis:])
    position = place
    if axis is not None:
        within = int(np.argmax(np.abs(np.moveaxis(error, axis, -1)[place])))
        position = (*place[:axis], within, *place[axis:])
    found, limit, size = (float(array[place]) for array in (errors, limits, sizes))
    return Part(kind, index, found, limit, size, position, int((shares > 1).sum()), shares.size)


def _shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the rows and the columns of a tensor."""
    if len(shape) == 1:
        return shape, (0,)
    axis = _along(len(shape))
    return shape[:-1], shape[:axis] + shape[axis + 1 :]


def _along(ndim: int) -> int:
    """Axis that a column lies along: the rows of a matrix; tokens, after the batch; or inputs, after the expert."""
    return 0 if ndim == 2 else 1


def _along_reference(error: np.ndarray, reference: np.ndarray) -> float:
    largest = float(np.max(np.abs(reference), initial=0.0))
    if not largest:
        return 0.0
    unit = reference / largest
    return float(np.sum(error / largest * unit) / np.sum(np.square(unit)))


def _rms(values: np.ndarray, axis: int) -> np.ndarray:
    """Neither overflows nor underflows where the result does not."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest:
        return np.sqrt(np.mean(values, axis=axis))
    return largest * np.sqrt(np.mean(np.square(values / largest), axis=axis))


def _position(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(values)), values.shape))
