"""How large an error may be: one table for all comparisons of traces.

Error and delta are root mean squares over a tensor. delta says how far rounding the weights moves the float64 result
(`numerics.perturbation_delta`); it travels in the metadata of a float64 trace. Allowed is the largest of what the table
says and, as in `numerics.allowed_error`, 4 roundoffs of rms, which is that of the truth's tensor:

    ==========  =====================  =====================  =====================  ========================
    dtype       forward, decode        loss, routing          gradient, updated      losses of a training run
    ==========  =====================  =====================  =====================  ========================
    float64     10 delta, 1e-12 rms    10 delta, 1e-12 rms    20 delta, 1e-12 rms    10 delta, 1e-9 rms
    float32     10 delta               10 delta, 1e-6 rms     20 delta               10 delta, 1e-5 rms
    bfloat16    4 delta                4 delta                10 delta               4 delta, 1e-2 rms
    ==========  =====================  =====================  =====================  ========================

Loss and routing have means over all tokens: what rounding the weights does averages out in them, the rounding of the
mean itself, 8 units in the last place, does not. `Scales` says what gradients may do that are 0 by mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_config.interchange.traces import FORWARD, GRADIENT, LOSS, LOSSES, ROUTING, UPDATED, Summary, group_of
from shared_config.numerics import FLOOR_ROUNDOFFS, UNIT_ROUNDOFF, as_float64, rms

Tensor = np.ndarray | Summary


@dataclass(frozen=True)
class Tolerance:
    """Error allowed: ``K`` deltas, or ``relative`` times rms(truth) if that is more."""

    K: float
    relative: float = 0.0


TOLERANCES = {
    "float64": {
        FORWARD: Tolerance(10, 1e-12),
        LOSS: Tolerance(10, 1e-12),
        GRADIENT: Tolerance(20, 1e-12),
        LOSSES: Tolerance(10, 1e-9),
    },
    "float32": {
        FORWARD: Tolerance(10),
        LOSS: Tolerance(10, 1e-6),
        GRADIENT: Tolerance(20),
        LOSSES: Tolerance(10, 1e-5),
    },
    "bfloat16": {
        FORWARD: Tolerance(4),
        LOSS: Tolerance(4),
        GRADIENT: Tolerance(10),
        LOSSES: Tolerance(4, 1e-2),
    },
}
COLUMNS = {LOSS: LOSS, ROUTING: LOSS, GRADIENT: GRADIENT, UPDATED: GRADIENT, LOSSES: LOSSES}
"""Group -> column of the table; all other groups are forward."""

VANISHING = 1e-12
NOISE_ROUNDOFFS = 20


def tolerance_of(group: str, dtype: str) -> Tolerance:
    """The entry of the table."""
    return TOLERANCES[dtype][COLUMNS.get(group, FORWARD)]


def coarser(dtype_a: str, dtype_b: str) -> str:
    """The dtype with the larger roundoff."""
    return max(dtype_a, dtype_b, key=UNIT_ROUNDOFF.__getitem__)


class Scales:
    """Limits of the tensors of one reference trace, with what depends on how large they are.

    A gradient whose RMS is below 1e-12 of the largest of all is 0 by mathematics (that of a query that sees one key, of
    a router whose only choice has weight p / p), and what is left of sums of large terms is noise. Its error may be 20
    roundoffs of the largest gradient. Adam divides a gradient by its own size, so noise of size g may move the first
    update by up to lr * g / (g + eps) either way.
    """

    def __init__(self, reference: Mapping[str, Tensor], config: Mapping[str, Any]):
        self._gradients = {name: _rms(tensor) for name, tensor in reference.items() if group_of(name) == GRADIENT}
        self._largest = max(self._gradients.values(), default=0.0)
        optimizer = config.get("optimizer", {})
        self._lr, self._eps = float(optimizer.get("lr", 0.0)), float(optimizer.get("eps", 0.0))

    def limit(self, name: str, dtype: str, scale: float, delta: float | None) -> float:
        """RMS error allowed to a tensor of this RMS ``scale``."""
        tolerance, roundoff = tolerance_of(group_of(name), dtype), UNIT_ROUNDOFF[dtype]
        return max(
            tolerance.K * (delta or 0.0),
            max(tolerance.relative, FLOOR_ROUNDOFFS * roundoff) * scale,
            self._noise(name, roundoff),
        )

    def _noise(self, name: str, roundoff: float) -> float:
        group, _, path = name.partition("/")
        if group == UPDATED:
            noise = self._noise(f"{GRADIENT}/{path}", roundoff)
            return 2 * self._lr * noise / (noise + self._eps) if noise else 0.0
        vanishes = self._gradients.get(name, math.inf) <= VANISHING * self._largest
        return NOISE_ROUNDOFFS * roundoff * self._largest if vanishes else 0.0


def _rms(tensor: Tensor) -> float:
    if isinstance(tensor, Summary):
        return tensor.rms
    values = as_float64(tensor)
    return rms(values[np.isfinite(values)])
