"""Gradients that are differences of large terms: how much noise rounding leaves of what mathematics makes 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared_config.parity.numerics import UNIT_ROUNDOFF

STORED = "float32"
"""The coarsest dtype that parameters and what routers compute are held in."""

VANISHING, NOISE_ROUNDOFFS, NOISE_OF_ITSELF = 1e-12, 20, 1e-3
"""What is 0 by mathematics, relative to the largest of its kind, and the noise that is left of it: `Cancellation`."""


@dataclass(frozen=True)
class Cancellation:
    """Gradients that are differences of large terms, and what rounding these terms leaves of them.

    A gradient whose RMS is at most 1e-12 of the largest of all is 0 by mathematics (that of a query that sees one key,
    of a router whose only choice has weight p / p). What is left of it is noise, of up to 20 roundoffs of the largest.
    In one that is larger, some terms may cancel, as in routers, which compute in at least float32: it may have as much
    noise of float32, but no more than 1e-3 of itself.

    Attributes:
        largest: RMS of the largest gradient.
    """

    largest: float

    def vanishes(self, scale: float) -> bool:
        """Whether a gradient of this RMS is 0 by mathematics."""
        return scale <= VANISHING * self.largest

    def noise(self, scale: float, roundoff: float) -> float:
        """RMS error that cancellation allows a gradient of this RMS."""
        if self.vanishes(scale):
            return NOISE_ROUNDOFFS * roundoff * self.largest
        return min(NOISE_ROUNDOFFS * min(roundoff, UNIT_ROUNDOFF[STORED]) * self.largest, NOISE_OF_ITSELF * scale)


def vanishing(sizes: Mapping[str, float]) -> list[str]:
    """Gradients that are 0 by mathematics, as of the bias of keys, which a softmax does not see.

    Args:
        sizes: RMS of each by name, computed in float64.
    """
    known = Cancellation(max(sizes.values(), default=0.0))
    return [name for name, size in sizes.items() if known.vanishes(size)]
