"""Slices of TPUs, by the names that libtpu gives them: "v5e:4x4" has 16 chips."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shared_config.errors import UserError
from shared_config.schema.base import shown

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        memory: bytes of HBM, of which its runtime takes some.
        axes: of a slice.
        most: chips of the largest slice.
        example: a slice.
    """

    memory: int
    axes: int
    most: int
    example: str


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(16 * GIB, 2, 256, "v5e:4x4"),
    "v5p": Chip(95 * GIB, 3, 8960, "v5p:2x2x4"),
    "v6e": Chip(32 * GIB, 2, 256, "v6e:8x8"),
}
"""As Google Cloud's documentation of each has it. A host has 2 x 2 chips, and slices are of whole hosts."""


@dataclass(frozen=True)
class Slice:
    """Chips of one kind, in a grid."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.sizes)


def parse_slice(text: str) -> Slice:
    """The slice of a name.

    Raises:
        UserError: there is none of this name; with examples.
    """
    kind, _, grid = text.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})*", grid):
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(f"--topology = {shown(text)}: must be a slice of {', '.join(CHIPS)}, as {examples}")
    sizes = tuple(int(size) for size in grid.split("x"))
    if len(sizes) != chip.axes or any(size % 2 for size in sizes[:2]) or math.prod(sizes) > chip.most:
        axes = " x ".join(("even", "even", "any")[: chip.axes])
        raise UserError(
            f"--topology = {shown(text)}: must be {axes} chips of {kind}, at most {chip.most}, as {chip.example}"
        )
    return Slice(text, chip, sizes)
