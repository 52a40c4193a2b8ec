"""Tensors in parts: those that one process holds of a tensor, or those that several files hold of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared_config.interchange.states import host_array

Box = tuple[slice, ...]
"""Where a part lies in its tensor: start and stop along each axis."""


@dataclass(frozen=True)
class Part:
    """Values of a tensor, from ``start`` on along each axis."""

    start: tuple[int, ...]
    values: np.ndarray

    @property
    def stop(self) -> tuple[int, ...]:
        """Where they end along each axis."""
        return tuple(first + size for first, size in zip(self.start, self.values.shape, strict=True))


@dataclass(frozen=True)
class Parts:
    """Some or all parts of one tensor. An index of slices reads a box of it, `np.asarray` all of it.

    Attributes:
        shape: of the whole tensor.
        held: the parts, which do not overlap.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    held: tuple[Part, ...] = ()

    def __getitem__(self, box: Box) -> np.ndarray:
        """The values in a box; those of a single part as they lie in memory.

        Raises:
            ValueError: parts of it are not held.
        """
        bounds = [one.indices(size)[:2] for one, size in zip(box, self.shape, strict=True)]
        shape = tuple(max(0, stop - start) for start, stop in bounds)
        shared = [(part, common) for part in self.held if (common := _common(part, bounds)) is not None]
        if sum(math.prod(_shape(common)) for _, common in shared) != math.prod(shape):
            raise ValueError(f"{bounds} of a tensor of shape {self.shape}: not all of its parts are held")
        if len(shared) == 1:
            part, common = shared[0]
            return part.values[*_moved(common, part.start), ...]
        result = np.empty(shape, self.dtype)
        for part, common in shared:
            result[_moved(common, [start for start, _ in bounds])] = part.values[_moved(common, part.start)]
        return result

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole tensor."""
        return np.asarray(self[tuple(slice(None) for _ in self.shape)], dtype=dtype)

    def layer(self, index: int) -> Parts:
        """What is held of one place of the first axis, as a tensor without that axis."""
        return Parts(
            self.shape[1:],
            self.dtype,
            tuple(
                Part(part.start[1:], part.values[index - part.start[0], ...])
                for part in self.held
                if part.start[0] <= index < part.stop[0]
            ),
        )


@dataclass(frozen=True)
class StateParts:
    """What one process holds of a `TrainingState`, or all of it as it lies in the files of a checkpoint.

    Attributes:
        weights, optimizer: as there; a tensor of which nothing is held may be there, or not.
    """

    step: int
    weights: Mapping[str, Parts]
    optimizer: Mapping[str, Parts]
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, Mapping[str, Parts]]:
        """Weights and optimizer, by these names."""
        return {"weights": self.weights, "optimizer": self.optimizer}


HostArray = np.ndarray | Parts
"""A tensor on the host, or mapped from files, in one part or in several that are put together where it is needed."""


def whole(name: str, array: object) -> Parts:
    """A tensor in one part; one that is in parts stays so.

    Args:
        array: of any library.
    """
    if isinstance(array, Parts):
        return array
    values = host_array(name, array)
    return Parts(values.shape, values.dtype, (Part((0,) * values.ndim, values),))


def stacked(layers: Sequence[HostArray]) -> Parts:
    """Tensors of one shape as one with a leading axis. Nothing is copied."""
    every = [whole("", layer) for layer in layers]
    held = (Part((index, *part.start), part.values[None]) for index, layer in enumerate(every) for part in layer.held)
    return Parts((len(every), *every[0].shape), every[0].dtype, tuple(held))


def covers(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether boxes, each from its start to its stop, form a grid that covers a tensor, each place once."""
    found = [tuple(zip(start, stop, strict=True)) for start, stop in boxes]
    if any(len(box) != len(shape) for box in found):
        return False
    axes = [sorted({box[axis] for box in found}) for axis in range(len(shape))]
    tiled = all(
        intervals and intervals[0][0] == 0 and intervals[-1][1] == size and _in_a_row(intervals)
        for intervals, size in zip(axes, shape, strict=True)
    )
    return tiled and len(found) == len(set(found)) == math.prod(map(len, axes))


def _in_a_row(intervals: Sequence[tuple[int, int]]) -> bool:
    meet = all(before[1] == after[0] for before, after in itertools.pairwise(intervals))
    return meet and all(start < stop or len(intervals) == 1 for start, stop in intervals)


def _common(part: Part, bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Where a part lies within bounds; None if it does not."""
    both = [
        (max(first, start), min(last, stop))
        for first, last, (start, stop) in zip(part.start, part.stop, bounds, strict=True)
    ]
    return both if all(start < stop for start, stop in both) else None


def _shape(box: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _moved(box: Sequence[tuple[int, int]], origin: Sequence[int]) -> Box:
    return tuple(slice(start - zero, stop - zero) for (start, stop), zero in zip(box, origin, strict=True))
