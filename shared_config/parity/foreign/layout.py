"""How one tensor becomes the same tensor of another implementation: operations that only move numbers.

    transpose              exchanges the last two axes
    swap I J               exchanges two axes
    permute I J K ...      axis k of the result is axis (I J K ...)[k]
    split N axis=A         one axis becomes two, the first of N: the heads of a projection
    merge N axis=A         the opposite: axis A, of N, and the one after it become one
    interleave N axis=A    within each of N heads, from halves (x0 x1 ... | y0 y1 ...) to pairs (x0 y0 x1 y1 ...)
    halves N axis=A        the opposite: from pairs, as some rotary embeddings rotate, to halves, as others do
    flip axis=A            turns the order round

Axes may be negative; one of negative axes fits a weight and its bias alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared_config.errors import UserError

NUMBERS: Mapping[str, tuple[int, int]] = {
    "transpose": (0, 0),
    "swap": (2, 2),
    "permute": (1, 16),
    "split": (1, 1),
    "merge": (1, 1),
    "interleave": (1, 1),
    "halves": (1, 1),
    "flip": (0, 0),
}
"""Name of an operation -> fewest and most numbers that follow it."""


@dataclass(frozen=True)
class Op:
    """One operation, as text says it.

    Attributes:
        numbers: those after its name.
        axis: that it works on.
    """

    name: str
    numbers: tuple[int, ...] = ()
    axis: int = 0

    def __str__(self) -> str:
        words = [self.name, *map(str, self.numbers)]
        return " ".join(words if self.name in ("transpose", "swap", "permute") else [*words, f"axis={self.axis}"])

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The array in its new layout, a copy in C order.

        Raises:
            ValueError: its shape does not allow it.
        """
        moved = self._moved(array)
        return np.ascontiguousarray(moved).reshape(moved.shape)

    def inverse(self) -> Op:
        """The operation that takes what this one made back."""
        if self.name == "permute":
            return Op("permute", tuple(int(place) for place in np.argsort(self.numbers)))
        below = self.axis < 0  # counted from the end, past the axis that comes or goes
        if self.name == "split":
            return Op("merge", self.numbers, self.axis - below)
        if self.name == "merge":
            return Op("split", self.numbers, self.axis + below)
        names = {"interleave": "halves", "halves": "interleave"}
        return Op(names.get(self.name, self.name), self.numbers, self.axis)

    def _moved(self, array: np.ndarray) -> np.ndarray:
        if self.name == "transpose":
            return np.swapaxes(array, -1, -2) if array.ndim > 1 else array
        if self.name == "swap":
            return np.swapaxes(array, *self.numbers)
        if self.name == "permute":
            return np.transpose(array, self.numbers)
        if self.name == "flip":
            return np.flip(array, self.axis)
        axis = self.axis % array.ndim
        before, size, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
        if self.name == "merge":
            if size != self.numbers[0] or not after:
                raise ValueError(
                    f"{self}: axis {axis} of {array.shape}: must have {self.numbers[0]}, with one after it"
                )
            return array.reshape(*before, size * after[0], *after[1:])
        heads = self.numbers[0]
        if size % heads:
            raise ValueError(f"{self}: axis {axis} of {array.shape} has {size}: must be a multiple of {heads}")
        if self.name == "split":
            return array.reshape(*before, heads, size // heads, *after)
        if size // heads % 2:
            raise ValueError(f"{self}: heads of {size // heads}: must be even")
        pairs = (2, size // heads // 2) if self.name == "interleave" else (size // heads // 2, 2)
        grouped = array.reshape(*before, heads, *pairs, *after)
        return np.swapaxes(grouped, len(before) + 1, len(before) + 2).reshape(array.shape)


def parse_op(text: str) -> Op:
    """An operation from its text, as in "split 4 axis=0".

    Raises:
        UserError: no such operation, or other numbers than it takes.
    """
    found = re.fullmatch(r"(\w+)((?: -?\d+)*)(?: axis=(-?\d+))?", text.strip())
    if found is None or found[1] not in NUMBERS:
        raise UserError(
            f"layout {text!r}: must be one of {', '.join(NUMBERS)}, with its numbers, as in 'split 4 axis=0'"
        )
    numbers = tuple(int(word) for word in found[2].split())
    fewest, most = NUMBERS[found[1]]
    if not fewest <= len(numbers) <= most:
        raise UserError(f"layout {text!r}: {found[1]} takes {fewest} to {most} numbers" + f", not {len(numbers)}")
    if found[1] in ("split", "merge", "interleave", "halves") and numbers[0] < 1:
        raise UserError(f"layout {text!r}: must have 1 head or more")
    return Op(found[1], numbers, int(found[3] or 0))
