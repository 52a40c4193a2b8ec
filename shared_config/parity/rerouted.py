"""What follows in a trace from choices of routers that are not those of the reference.

Near ties are decided by rounding, also where none of the runs that deltas are measured by decided one otherwise. Then a
token goes through another expert, and what comes of it has nothing to do with the reference. Where tokens choose, that
is the token itself and, by attention, those after it in its sequence; all others are judged as ever. Where deltas
explain the choices, they hold what follows from them, too: then the tensor as a whole is judged with these tokens.

Masks are bool. Shapes: B sequences, S positions, T = B * S tokens, k choices of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared_config.interchange.toml import number_of, section_of
from shared_config.parity.configs import experts_choose_tokens, has_experts
from shared_config.parity.measure import summary_of
from shared_config.parity.numerics import as_float64
from shared_config.parity.routes import is_routes, unequal_choices
from shared_config.parity.tolerance import Tensor
from shared_config.parity.traces import DECODE, FORWARD, LOSS, ROUTING, Summary, Trace, group_of

_MEANS = (LOSS, ROUTING)
"""Groups whose tensors are means over tokens, of which a few move them by their share."""


@dataclass(frozen=True)
class Rerouted:
    """The choices of one trace that are not those of the reference, and what they reach.

    Attributes:
        after: tensors that depend on a choice that differs.
        excused: those that depend on one that no delta explains.
        unseen: those that depend on choices that no trace records.
        positions_BS: tokens that chose otherwise, and those after them in their sequence; None where that is not known,
            or where a choice changes those of other tokens: then any may be reached.
        before: name of routes -> such tokens of the routers before it.
    """

    after: frozenset[str] = frozenset()
    excused: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()
    positions_BS: np.ndarray | None = None
    before: Mapping[str, np.ndarray] = field(default_factory=dict)

    def has_parts(self, name: str, tensor: Tensor) -> bool:
        """Whether the parts of a tensor can be judged: those of what `kept` leaves of it."""
        return name not in self.unseen and (name not in self.after or self._places(name, tensor) is not None)

    def kept(self, name: str, value: Tensor, reference: Tensor) -> Tensor:
        """A tensor with the values of the reference where another choice reaches it, so that the rest is judged, and
        what is not finite.
        """
        places = self._places(name, value)
        if places is None or isinstance(value, Summary) or isinstance(reference, Summary):
            return value
        reached = places.reshape(*places.shape, *[1] * (value.ndim - places.ndim)) & np.isfinite(as_float64(value))
        return np.where(reached, as_float64(reference), as_float64(value))

    def allowed(self, name: str, tensor: Tensor, ceiling: float) -> float:
        """RMS error that another choice explains by itself, where ``ceiling`` is what it could explain at all: none of
        what `kept` leaves.
        """
        is_kept = not isinstance(tensor, Summary) and self._places(name, tensor) is not None
        if name not in self.excused or is_kept:
            return 0.0
        share = 1.0 if self.positions_BS is None else float(self.positions_BS.mean())
        return ceiling * (share if group_of(name) in _MEANS else math.sqrt(share))

    def own(self, name: str, unequal_Tk: np.ndarray) -> np.ndarray:
        """Which of the unequal choices of a router are its own, and don't follow from those of routers before it."""
        before_BS = self.before.get(name)
        return unequal_Tk if before_BS is None else unequal_Tk & ~before_BS.reshape(-1, 1)

    def _places(self, name: str, tensor: Tensor) -> np.ndarray | None:
        """Where, along its first axes, another choice reaches an activation; None if that is not known."""
        if self.positions_BS is None or name not in self.after or group_of(name) not in (FORWARD, DECODE):
            return None
        along = (self.positions_BS, self.positions_BS.reshape(-1))
        return next((places for places in along if tensor.shape[: places.ndim] == places.shape), None)


def rerouted(
    trace: Trace, against: Trace, order: Sequence[str], explained: Callable[[str], float], slack: float
) -> Rerouted:
    """What follows from the choices of a trace that are not those of another.

    Args:
        order: names of all tensors, as they were computed.
        explained: name of routes -> how many choices deltas explain.
        slack: how many choices of a router may differ without that. Nothing excuses what follows from more.
    """
    decoded = (name for name in order if group_of(name) == DECODE and has_experts(trace.meta.config_fields))
    unseen = frozenset([*(order if _are_unseen(trace, against) else ()), *decoded])
    changed = [name for name in order if is_routes(name) and _differ(name, trace, against)]
    batch, before, excused = _batch(changed, against), {}, []
    reached_BS = None if batch is None else np.zeros(batch, bool)
    for name in changed:
        unequal_Tk = _unequal(name, trace, against)
        if reached_BS is not None:
            before[name] = reached_BS
            unequal_Tk = unequal_Tk & ~reached_BS.reshape(-1, 1)
            others_BS = unequal_Tk.any(axis=1).reshape(reached_BS.shape)
            reached_BS = reached_BS | np.logical_or.accumulate(others_BS, axis=1)
        if explained(name) < unequal_Tk.sum() <= slack:
            excused.append(name)
    after, without_delta = (frozenset(order[order.index(names[0]) :] if names else ()) for names in (changed, excused))
    return Rerouted(after, without_delta, unseen, reached_BS, before)


def routes_differ(trace: Trace, against: Trace) -> bool:
    """Whether routes differ where both recorded them; true if there are experts but no routes to see."""
    return _are_unseen(trace, against) or any(_differ(name, trace, against) for name in _routes(trace, against))


def _unequal(name: str, trace: Trace, against: Trace) -> np.ndarray:
    """Choices that are not those of the other trace: all where these are summed up alone, or others in number."""
    a, b = trace.tensors[name], against.tensors[name]
    if isinstance(a, Summary) or isinstance(b, Summary) or a.shape != b.shape:
        return np.ones(b.shape, bool)
    return unequal_choices(a, b, experts_choose_tokens(trace.meta.config_fields))


def _batch(routes: Sequence[str], trace: Trace) -> tuple[int, int] | None:
    """Sequences and positions of the tokens that choose, as the first activation that has both says; None where a
    choice reaches other tokens, those that an expert has no room for or, among images, those before it.
    """
    config = trace.meta.config_fields
    shapes = [trace.tensors[name].shape for name in routes]
    full = number_of(config, "model", "moe_capacity_factor", 0.0) > 0
    if full or section_of(config, "vlm") or {len(shape) for shape in shapes} != {2}:
        return None
    tokens = {shape[0] for shape in shapes}
    outputs = (tensor.shape for name, tensor in trace.tensors.items() if group_of(name) == FORWARD)
    batches = ((shape[0], shape[1]) for shape in outputs if len(shape) > 2)
    return next((batch for batch in batches if {math.prod(batch)} == tokens), None)


def _differ(name: str, trace: Trace, against: Trace) -> bool:
    """Whether both recorded a tensor, and not the same values."""
    tensors = [side.tensors.get(name) for side in (trace, against)]
    return len({summary_of(tensor).hash for tensor in tensors if tensor is not None}) > 1


def _routes(trace: Trace, against: Trace) -> list[str]:
    return [name for name in trace.tensors if is_routes(name) and name in against.tensors]


def _are_unseen(trace: Trace, against: Trace) -> bool:
    """Whether there are experts, but no choices that both recorded."""
    return has_experts(trace.meta.config_fields) and not _routes(trace, against)
