"""The state of an optimiser in names that do not depend on the framework, and what differs between two of them.

An entry is ``<kind>.<parameter>``: "m" the average of gradients, "v" that of their squares, "t" the number of updates,
"ema" the average of weights; any other kind has the name that its optimiser gives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from shared_config.contract.moments import MOMENTS, UPDATES
from shared_config.errors import UserError
from shared_config.interchange.states import host_array
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.transfer import transfer
from shared_config.parity.numerics import as_float64, relative_error

Arrays = Mapping[str, np.ndarray]
Kinds = Mapping[str, Arrays]

MEAN, SQUARE = MOMENTS
KINDS = {
    "exp_avg": MEAN,
    "mu": MEAN,
    "exp_avg_sq": SQUARE,
    "nu": SQUARE,
    "step": UPDATES,
    "count": UPDATES,
    "momentum_buffer": "momentum",
    "trace": "momentum",
    "sum_of_squares": "sum",
}
"""What torch and optax call a kind -> its name here."""
POWERS = {MEAN: 1, "momentum": 1, SQUARE: 2}
"""Of the gradient in each update of a moment."""
SQUARED = 2.0
"""How many times a relative error of the gradient is that of its square."""
FITTED = 10.0
"""Tolerances up to which what moments are made of is told."""


@dataclass(frozen=True)
class Kept:
    """What a run keeps after a step.

    Attributes:
        now, before: the state after this step, and after the one before; `aligned`.
        gradients: of this step.
    """

    now: Kinds
    before: Kinds = field(default_factory=dict)
    gradients: Arrays = field(default_factory=dict)


def aligned(
    state: Mapping[str, object], parameters: Arrays, names: Map | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Kind -> parameter -> values of the parameter's shape, moved as the parameters are; scalars are spread over it.

    Args:
        parameters: those that the state is of.

    Raises:
        UserError: an entry of no parameter, or of another shape.
    """
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state.items():
        kind, _, parameter = name.partition(".")
        if parameter not in parameters:
            raise UserError(f"state: {name}: must be a kind, a dot and one of {', '.join(parameters)}")
        array = np.array(host_array(name, value))  # a copy: the run may write to its own
        shape = np.shape(parameters[parameter])
        if array.shape not in ((), shape):
            raise UserError(f"state: {name}: shape = {array.shape}: must be () or that of {parameter}, {shape}")
        kinds.setdefault(kind, {})[parameter] = np.broadcast_to(array, shape)
    return {kind: transfer(own, names) for kind, own in kinds.items()}


def unshared(a: Kinds, b: Kinds) -> tuple[str, ...]:
    """Kinds that only one of the two keeps."""
    return tuple(kind for kind in (*a, *b) if kind not in a or kind not in b)


def first_difference(a: Kinds, b: Kinds, tolerance: float) -> tuple[str, float]:
    """(entry, relative error) of the first that differs, in the order of ``a``; ("", 0.0) if none does.

    Integers are compared exactly.

    Raises:
        UserError: a kind that both keep is of other parameters.
    """
    for kind, own in a.items():
        if kind not in b:
            continue
        alone = [f"{kind}.{name}" for name in sorted(own.keys() ^ b[kind].keys())]
        if alone:
            raise UserError(f"state: {', '.join(alone)}: only one of the two runs keeps it")
        for name, value in own.items():
            error = relative_error(b[kind][name], value)
            counts = kind == UPDATES or value.dtype.kind in "iu"
            if not error <= (0.0 if counts else SQUARED * tolerance):
                return f"{kind}.{name}", error
    return "", 0.0


def state_suspects(entry: str, a: Kept, b: Kept, tolerance: float) -> Iterator[str]:
    """What is confirmed of an entry that differs, in words."""
    kind, _, name = entry.partition(".")
    now_a, now_b = a.now[kind][name], b.now[kind][name]
    if kind == UPDATES:
        yield f"{kind}: b counts {int(now_b.flat[0])} updates, a {int(now_a.flat[0])}"
    elif _is_stale(kind, name, b) and not _is_stale(kind, name, a):
        yield f"{kind}: b leaves it as it was before this step"
    elif kind in POWERS:
        made_a, made_b = _made_of(kind, a, tolerance), _made_of(kind, b, tolerance)
        if made_a and made_b and made_a != made_b:
            yield f"{kind}: b {made_b}, a {made_a}"


def _is_stale(kind: str, name: str, kept: Kept) -> bool:
    before = kept.before.get(kind, {}).get(name)
    return before is not None and np.array_equal(before, kept.now[kind][name])


def _made_of(kind: str, kept: Kept, tolerance: float) -> str:
    """The shares of a moment and of the gradient in the moment of now, in words; "" where it is no such sum."""
    names = [name for name in kept.now[kind] if name in kept.gradients]
    if not names:
        return ""
    before = kept.before.get(kind, {})
    given = _joined(kept.gradients[name] for name in names) ** POWERS[kind]
    old = _joined(before.get(name, np.zeros_like(kept.now[kind][name])) for name in names)
    columns = np.stack([old, given], 1) if old.any() else given[:, None]
    new = _joined(kept.now[kind][name] for name in names)
    shares = np.linalg.lstsq(columns, new, rcond=None)[0]
    if not relative_error(columns @ shares, new) <= FITTED * tolerance:
        return ""
    of_gradient = f"takes {shares[-1]:.4g} of the gradient{' squared' if POWERS[kind] == 2 else ''}"
    return f"keeps {shares[0]:.4g} of it and {of_gradient}" if len(shares) == 2 else of_gradient


def _joined(arrays: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([as_float64(array).reshape(-1) for array in arrays])
