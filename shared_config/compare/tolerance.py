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

Deltas are read from files and not taken on trust: `Scales.largest_delta` says what rounding can do at all, and
`Scales.ceiling` bounds what any delta allows by the sizes of the two tensors themselves.
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

ROUTES = ".indices"
"""End of the names of what routers chose."""

VANISHING = 1e-12
NOISE_ROUNDOFFS = 20

CONDITION = 2.0**16
"""Largest factor by which a model of any use amplifies a relative rounding of its weights. Those of the presets and of
drawn configs measure up to 36 in float32 and 76 in bfloat16, gradients of 1 % of the largest included."""

WHOLE = {FORWARD: 1.0, GRADIENT: 3.0}
"""Column of the table -> largest error, relative to the smaller of two tensors, that rounding explains. A gradient may
be what is left of larger terms."""

UNRELATED = 1.5
"""Error, relative to the larger of two tensors, of any that have nothing in common."""

EXPERTS = ".experts"
REROUTED = 4.0
"""Largest delta, relative to the tensor, where rounding changes routes; presets measure up to 1.9."""


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
        self._gradients = {name: scale_of(tensor) for name, tensor in reference.items() if group_of(name) == GRADIENT}
        self._largest = max(self._gradients.values(), default=0.0)
        forward = (scale_of(tensor) for name, tensor in reference.items() if group_of(name) == FORWARD)
        self._largest_forward = max(forward, default=0.0)
        self._places = max((math.prod(t.shape) for name, t in reference.items() if name.endswith(ROUTES)), default=0)
        self._routed = bool(self._places) or has_experts(config)
        optimizer = config.get("optimizer", {})
        self._lr, self._eps = float(optimizer.get("lr", 0.0)), float(optimizer.get("eps", 0.0))

    def limit(self, name: str, dtype: str, scale: float, delta: float | None, ceiling: float = math.inf) -> float:
        """RMS error allowed to a tensor of this RMS ``scale``; a delta allows no more than ``ceiling``."""
        tolerance, roundoff = tolerance_of(group_of(name), dtype), UNIT_ROUNDOFF[dtype]
        return max(
            min(tolerance.K * (delta or 0.0), ceiling),
            max(tolerance.relative, FLOOR_ROUNDOFFS * roundoff) * scale,
            self._noise(name, roundoff),
        )

    def largest_delta(self, name: str, dtype: str, tensor: Tensor) -> float:
        """RMS by which rounding the weights can move a tensor at all.

        That is its size, times the condition of the model, times the roundoff, and never more than the whole tensor. A
        gradient is measured by the largest, as it may be what is left of terms of that size; an update moves by a step
        of Adam either way. Where routes change, a tensor becomes another one of its size, and counts of routes move by
        as many as there are.
        """
        group, scale = group_of(name), scale_of(tensor)
        if group == ROUTING:
            return REROUTED * max(scale, 1.0) + (self._places or math.inf)
        if group == GRADIENT:
            scale = self._largest
        elif self._vanishes(name, scale):
            scale = self._largest_forward
        factor = REROUTED if self._routed else min(1.0, CONDITION * UNIT_ROUNDOFF[dtype])
        return factor * scale + (2 * self._lr if group == UPDATED else 0.0)

    def ceiling(self, name: str, dtype: str, scales: tuple[float, float], rerouted: bool) -> float:
        """Largest RMS error that a delta may allow two tensors of these RMS, the second being that of the reference.

        Args:
            rerouted: whether routes differ between the two. Counts of routes, and what only the tokens of an expert
                pass through, may then vanish on one side.
        """
        group, smaller, roundoff = group_of(name), min(scales), UNIT_ROUNDOFF[dtype]
        if rerouted and (group == ROUTING or EXPERTS in name):
            return UNRELATED * max(scales)
        if self._vanishes(name, scales[1]):
            return NOISE_ROUNDOFFS * roundoff * self._largest_forward
        gradient = group == GRADIENT
        whole = WHOLE[GRADIENT if gradient else FORWARD] * smaller
        smooth = CONDITION * roundoff * (self._largest if gradient else smaller)
        return whole if rerouted else min(whole, tolerance_of(group, dtype).K * smooth)

    def _vanishes(self, name: str, scale: float) -> bool:
        """Whether an activation is 0 by mathematics."""
        return group_of(name) == FORWARD and scale <= VANISHING * self._largest_forward

    def _noise(self, name: str, roundoff: float) -> float:
        group, _, path = name.partition("/")
        if group == UPDATED:
            noise = self._noise(f"{GRADIENT}/{path}", roundoff)
            return 2 * self._lr * noise / (noise + self._eps) if noise else 0.0
        vanishes = self._gradients.get(name, math.inf) <= VANISHING * self._largest
        return NOISE_ROUNDOFFS * roundoff * self._largest if vanishes else 0.0


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config, as nested dicts, routes tokens to experts."""
    return config.get("model", {}).get("num_experts", 0) > 0 or experts_choose_tokens(config)


def experts_choose_tokens(config: Mapping[str, Any]) -> bool:
    """Whether experts take tokens, instead of tokens experts."""
    return "moma_experts_per_modality" in config.get("vlm", {})


def scale_of(tensor: Tensor) -> float:
    """RMS of what is finite."""
    if isinstance(tensor, Summary):
        return tensor.rms
    values = as_float64(tensor)
    return rms(values[np.isfinite(values)])
