"""How large an error may be: one table for all comparisons of traces.

Error and delta are root mean squares over a tensor. delta says how far rounding the weights, each as far as the dtype
rounds it (`dtypes.roundoffs_of`), moves the float64 result (`numerics.perturbation_delta`); it travels in the metadata
of a float64 trace. Allowed is the largest of what the table says and, as in `numerics.allowed_error`, 4 roundoffs of
rms, which is that of the truth's tensor:

    ==========  =====================  =====================  =====================  ========================
    dtype       forward, decode        loss, routing          gradients, updated     losses of a training run
    ==========  =====================  =====================  =====================  ========================
    float64     10 delta, 1e-12 rms    10 delta, 1e-12 rms    20 delta, 1e-12 rms    10 delta, 1e-9 rms
    float32     10 delta               10 delta, 1e-6 rms     20 delta               10 delta, 1e-5 rms
    float16     4 delta                4 delta                10 delta               4 delta, 1e-2 rms
    bfloat16    4 delta                4 delta                10 delta               4 delta, 1e-2 rms
    fp8         4 delta                4 delta                10 delta               4 delta, 2e-2 rms
    ==========  =====================  =====================  =====================  ========================

Loss and routing have means over all tokens: what rounding the weights does averages out in them, the rounding of the
mean itself, 8 units in the last place, does not.

An update is a parameter after a step, and its delta that of the step: what the rounding of the gradient moves. Its
roundoff is that of the dtype that it is stored in, for which our trainers have at least float32. The arithmetic of an
optimiser of another library is allowed `FOREIGN_STEP` of the learning rate.

Rows, columns and elements of a tensor, and its size as a whole (`compare.parts`), are held to their own deltas:

    ==========  ===========  ===================  ===================
    dtype       row, column  element (gradients)  scale (gradients)
    ==========  ===========  ===================  ===================
    float64     20           40                   24
    float32     20           40                   24
    float16     7            13 (22)              6 (8)
    bfloat16    7            13 (22)              6 (8)
    fp8         7            13 (22)              6 (8)
    ==========  ===========  ===================  ===================

Elements of updates have four times as much (`ELEMENT_OF_STEP`).

`tests/parity/false_alarms.py` says how far from these limits correct pairs stay.

Integers are exact, but for as many choices of routers as K deltas, which are numbers of choices; in bfloat16 for one
choice and the one it displaces, too (`ROUTE_SLACK`).

`Cancellation` is the one rule for gradients that cancel to 0, or nearly so. Deltas are read from files and not taken on
trust: `Scales.largest_delta` says what rounding can do at all, and `Scales.ceiling` bounds what any delta allows by the
sizes of the two tensors themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from shared_config.interchange.toml import number_of
from shared_config.parity.cancellation import NOISE_ROUNDOFFS, STORED, VANISHING, Cancellation
from shared_config.parity.configs import has_experts, has_kinks, step_sensitivity
from shared_config.parity.numerics import FLOOR_ROUNDOFFS, UNIT_ROUNDOFF, as_float64, rms
from shared_config.parity.parts import PartLimits
from shared_config.parity.routes import is_routes
from shared_config.parity.traces import (
    COTANGENT,
    DECODE,
    FORWARD,
    GRADIENT,
    LOSS,
    LOSSES,
    ROUTING,
    UPDATED,
    Summary,
    group_of,
)

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
    "float16": {FORWARD: Tolerance(4), LOSS: Tolerance(4), GRADIENT: Tolerance(10), LOSSES: Tolerance(4, 1e-2)},
    "bfloat16": {FORWARD: Tolerance(4), LOSS: Tolerance(4), GRADIENT: Tolerance(10), LOSSES: Tolerance(4, 1e-2)},
    "fp8": {FORWARD: Tolerance(4), LOSS: Tolerance(4), GRADIENT: Tolerance(10), LOSSES: Tolerance(4, 2e-2)},
}
COLUMNS = {LOSS: LOSS, ROUTING: LOSS, COTANGENT: GRADIENT, GRADIENT: GRADIENT, UPDATED: GRADIENT, LOSSES: LOSSES}
"""Group -> column of the table; all other groups are forward."""

PARTS = (FORWARD, DECODE, COTANGENT, GRADIENT, UPDATED)
"""Groups whose tensors are judged by rows, columns and elements, too."""

PART_LIMITS = {
    "float64": {FORWARD: PartLimits(20, 40, 24), GRADIENT: PartLimits(20, 40, 24)},
    "float32": {FORWARD: PartLimits(20, 40, 24), GRADIENT: PartLimits(20, 40, 24)},
    "float16": {FORWARD: PartLimits(7, 13, 6), GRADIENT: PartLimits(7, 22, 8)},
    "bfloat16": {FORWARD: PartLimits(7, 13, 6), GRADIENT: PartLimits(7, 22, 8)},
    "fp8": {FORWARD: PartLimits(7, 13, 6), GRADIENT: PartLimits(7, 22, 8)},
}
ELEMENT_OF_STEP = 4
"""Factor of the element's limit in updates: Adam divides a gradient by its size, so that rounding moves the step of an
element whose gradient is nearly 0 by as much as the learning rate, which few runs see.
"""

FOREIGN_STEP = 2.0**-14
"""Error, relative to the largest step, of an optimiser that computes ``1 - beta2**step`` in float32, where few of the
digits of 0.001 are left.
"""
FOREIGN_ROUNDOFFS = 16
"""The same in roundoffs of the parameter's dtype, which counts where it is more."""

ROUTE_SLACK = {"float64": 0, "float32": 0, "float16": 2, "bfloat16": 2, "fp8": 2}
"""Unequal choices that are allowed to a router even where none of the runs that deltas are measured by had one."""

KINK = 3
"""Factor of K for gradients and updates where an activation has a kink: in an expert with few tokens, a unit that
rounding switches on or off is a large part of them."""

CONDITION = 2.0**16
"""Largest factor by which a model of any use amplifies a relative rounding of its weights. Those of the presets and of
drawn configs measure up to 36 in float32 and 76 in bfloat16, gradients of 1 % of the largest included."""

SWITCHED = 16
"""Factor of `CONDITION` in gradients where an activation has a kink: of a small layer, one unit that rounding switches
on or off is as much as this. One of 150 drawn jobs measured 68,000 of its largest gradient's roundoffs, a relu's.
"""

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
    """The one further down the table."""
    return max(dtype_a, dtype_b, key=list(TOLERANCES).index)


class Scales:
    """Limits of the tensors of one reference trace, with what depends on how large they are.

    Args:
        foreign: whether an optimiser of another library made the updates.
        zeros: names of gradients that are 0 by mathematics, if they are small enough: the reference may be noise.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        config: Mapping[str, object],
        foreign: bool = False,
        zeros: Collection[str] = (),
    ):
        tensors = {name: tensor for name, tensor in reference.items() if group_of(name) == GRADIENT}
        self._gradients = {name: scale_of(tensor) for name, tensor in tensors.items()}
        self._cancellation = Cancellation(max(self._gradients.values(), default=0.0))
        forward = (scale_of(tensor) for name, tensor in reference.items() if group_of(name) == FORWARD)
        self._largest_forward = max(forward, default=0.0)
        self._sizes = {name: scale_of(tensor) for name, tensor in reference.items() if group_of(name) == COTANGENT}
        self._cotangents = Cancellation(max(self._sizes.values(), default=0.0))
        self._places = max((math.prod(t.shape) for name, t in reference.items() if is_routes(name)), default=0)
        self._routed = bool(self._places) or has_experts(config)
        self._kinked = has_kinks(config)
        self._lr = number_of(config, "optimizer", "lr", 0.0)
        self._foreign, self._zeros = foreign, zeros
        self._stored = {name: str(tensor.dtype) for name, tensor in reference.items() if group_of(name) == UPDATED}
        sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
        norm = math.sqrt(sum(size * self._gradients[name] ** 2 for name, size in sizes.items()))
        self._step_of_gradient = self._lr * step_sensitivity(config, norm, sum(sizes.values()))

    def limit(self, name: str, dtype: str, scale: float, delta: float | None, ceiling: float = math.inf) -> float:
        """RMS error allowed to a tensor of this RMS ``scale``; a delta allows no more than ``ceiling``."""
        K = tolerance_of(group_of(name), dtype).K * (KINK if self._switches(name, dtype) else 1)
        return max(
            min(K * (delta or 0.0), ceiling),
            self._relative(name, dtype) * scale,
            self._noise(name, UNIT_ROUNDOFF[dtype]),
        )

    def part_limits(self, name: str, dtype: str, scale: float) -> PartLimits | None:
        """What is allowed to the parts of a tensor of this RMS; None where the whole says all there is to say.

        That is where it is 0 by mathematics; and gradients and steps of a model with an activation that has a kink: a
        unit that rounding switches on or off gets another row. So does a first step of Adam where the gradient of an
        element is so small that a narrow dtype gives it another sign.
        """
        group = group_of(name)
        if group not in PARTS or self._vanishes(name, scale):
            return None
        if group == UPDATED and self._foreign and UNIT_ROUNDOFF[dtype] > UNIT_ROUNDOFF[STORED]:
            return None
        if group in (GRADIENT, UPDATED):
            gradient = self._gradient(name, UNIT_ROUNDOFF[dtype])
            vanishes = gradient is not None and self._cancellation.vanishes(gradient)
            if vanishes or self._switches(name, dtype):
                return None
        limits = PART_LIMITS[dtype][COLUMNS.get(group, FORWARD)]
        return dataclasses.replace(
            limits,
            element=limits.element * (ELEMENT_OF_STEP if group == UPDATED else 1),
            relative=self._relative(name, dtype),
            absolute=self._noise(name, UNIT_ROUNDOFF[dtype]),
            of_steps=group == UPDATED,
        )

    def largest_delta(self, name: str, dtype: str, tensor: Tensor) -> float:
        """RMS by which rounding the weights can move a tensor at all, or how many choices of a router.

        That is its size, times the condition of the model, times the roundoff, and never more than the whole tensor. A
        gradient is measured by the largest, as it may be what is left of terms of that size; a step by what Adam may do
        either way. Where routes change, a tensor becomes another one of its size, and counts of routes move by as many
        as there are.
        """
        group, scale = group_of(name), scale_of(tensor)
        if is_routes(name):
            return math.prod(tensor.shape)
        if group == ROUTING:
            return REROUTED * max(scale, 1.0) + (self._places or math.inf)
        if group in (COTANGENT, GRADIENT):
            scale = self._cancellation_of(group).largest
        elif self._vanishes(name, scale):
            scale = self._largest_forward
        condition = CONDITION * (SWITCHED if self._switches(name, dtype) else 1)
        factor = REROUTED if self._routed else min(1.0, condition * UNIT_ROUNDOFF[dtype])
        return factor * scale + (2 * self._lr if group == UPDATED else 0.0)

    def ceiling(self, name: str, dtype: str, scales: tuple[float, float], rerouted: bool) -> float:
        """Largest RMS error that a delta may allow two tensors of these RMS, the second being that of the reference.

        Args:
            rerouted: whether routes differ between the two. Counts of routes, and what only the tokens of an expert
                pass through, may then vanish on one side.
        """
        group, smaller, roundoff = group_of(name), min(scales), UNIT_ROUNDOFF[dtype]
        if group == UPDATED:
            return min(self._lr, WHOLE[FORWARD] * smaller)
        if rerouted and (group == ROUTING or EXPERTS in name):
            return UNRELATED * max(scales)
        if self._vanishes(name, scales[1]):
            return (
                NOISE_ROUNDOFFS * roundoff * (self._cotangents.largest if group == COTANGENT else self._largest_forward)
            )
        gradient = group in (COTANGENT, GRADIENT)
        whole = WHOLE[GRADIENT if gradient else FORWARD] * smaller
        smooth = CONDITION * roundoff * (self._cancellation_of(group).largest if gradient else smaller)
        return whole if rerouted else min(whole, tolerance_of(group, dtype).K * smooth)

    def _cancellation_of(self, group: str) -> Cancellation:
        return self._cotangents if group == COTANGENT else self._cancellation

    def _vanishes(self, name: str, scale: float) -> bool:
        """Whether an activation, or the gradient of one, is 0 by mathematics."""
        if group_of(name) == COTANGENT:
            return self._cotangents.vanishes(scale)
        return group_of(name) == FORWARD and scale <= VANISHING * self._largest_forward

    def _switches(self, name: str, dtype: str) -> bool:
        """Whether rounding may switch a unit on or off that a gradient, or a step, passes through."""
        return self._kinked and dtype != "float64" and group_of(name) in (COTANGENT, GRADIENT, UPDATED)

    def _relative(self, name: str, dtype: str) -> float:
        """Error relative to the tensor that is always allowed."""
        tolerance, roundoff = tolerance_of(group_of(name), dtype), UNIT_ROUNDOFF[dtype]
        if group_of(name) == UPDATED:
            roundoff = min(roundoff, self._stored_roundoff(name))
        return max(tolerance.relative, FLOOR_ROUNDOFFS * roundoff)

    def _gradient(self, name: str, roundoff: float) -> float | None:
        """RMS of a parameter's gradient, 0 of one that vanishes but for rounding; None if there is none."""
        name = f"{GRADIENT}/{name.partition('/')[2]}"
        scale = self._gradients.get(name)
        if scale is not None and name in self._zeros and scale <= self._cancellation.noise(0.0, roundoff):
            return 0.0
        return scale

    def _stored_roundoff(self, name: str) -> float:
        """Of the dtype that a parameter has, at least that of float32."""
        return max(UNIT_ROUNDOFF.get(self._stored.get(name, STORED), 0.0), UNIT_ROUNDOFF[STORED])

    def _of_foreign_step(self, name: str, roundoff: float) -> float:
        if not self._foreign or roundoff < UNIT_ROUNDOFF[STORED]:
            return 0.0
        if self._gradient(name, roundoff) == 0:  # Adam divides noise by its size
            return 2 * self._lr
        return self._lr * max(FOREIGN_STEP, FOREIGN_ROUNDOFFS * self._stored_roundoff(name))

    def _noise(self, name: str, roundoff: float) -> float:
        group = group_of(name)
        if group == COTANGENT:
            return self._cotangents.noise(self._sizes.get(name, 0.0), roundoff)
        gradient = self._gradient(name, roundoff)
        if group not in (GRADIENT, UPDATED) or gradient is None:
            return 0.0
        noise = self._cancellation.noise(gradient, roundoff)
        if group == GRADIENT:
            return noise
        return max(min(noise * self._step_of_gradient, self._lr / 4), self._of_foreign_step(name, roundoff))


def scale_of(tensor: Tensor) -> float:
    """RMS of what is finite."""
    if isinstance(tensor, Summary):
        return tensor.rms
    values = as_float64(tensor)
    return rms(values[np.isfinite(values)])
