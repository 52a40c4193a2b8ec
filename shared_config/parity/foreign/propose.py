"""Suggests a map between two implementations: from shapes and order, and where these leave a choice, from values or a
probe. What nothing decides is said, and not guessed.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.states import host_array
from shared_config.parity.foreign.layout import Op, parse_op
from shared_config.parity.foreign.mapping import Map, Rule

VALUES, SHAPES, PROBE = "values", "shapes", "probe"
MOST_TRIALS = 720
"""Maps that a probe is asked about."""
MOST_AXES = 5
"""Of tensors whose axes may come in another order."""
HEADS = 128
"""Most heads that a rotary layout is looked for with."""

Probe = Callable[[Map], bool]
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Proposal:
    """A map, and what it rests on.

    Attributes:
        evidence: "values", "shapes" or "probe" for each rule of `Map.weights`.
    """

    map: Map
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Tensors whose names differ in numbers only.

    Attributes:
        pattern: with stars in place of the numbers.
        names: in the order of their numbers.
    """

    pattern: str
    names: tuple[str, ...]
    shape: tuple[int, ...]


def propose_map(a: Mapping[str, object], b: Mapping[str, object], probe: Probe | None = None) -> Proposal:
    """A map of weights from ``a`` to ``b``.

    Where both hold the same values, in whatever order, these decide, and the map moves them bit by bit. Otherwise
    shapes do, where they leave no choice; where they do, as for square matrices, or queries and keys, the probe is
    asked.

    Args:
        a, b: arrays or tensors by name.
        probe: whether the two functions give the same with weights that a map moved; None to do without.

    Raises:
        UserError: what has no counterpart, or several, so that only a probe (or a rule by hand) can tell.
    """
    arrays_a, arrays_b = ({name: host_array(name, value) for name, value in side.items()} for side in (a, b))
    found = list(_by_values(arrays_a, arrays_b))
    evidence = [VALUES] * len(found)
    left_a = _without(arrays_a, {name for rule in found for name in _names(rule.a, arrays_a)})
    left_b = _without(arrays_b, {name for rule in found for name in _names(rule.b, arrays_b)})
    choices = list(_by_shapes(left_a, left_b))
    decided = [options[0] for options in choices if len(options) == 1]
    found, evidence = [*found, *decided], [*evidence, *[SHAPES] * len(decided)]
    open_ones = [options for options in choices if len(options) > 1]
    if open_ones:
        chosen = _probed(found, open_ones, probe)
        found, evidence = [*found, *chosen], [*evidence, *[PROBE] * len(chosen)]
    elif probe is not None and not probe(Map(tuple(found))):
        raise UserError("the only map that shapes allow does not make the two functions the same")
    return Proposal(Map(tuple(found)), tuple(evidence))


def families(weights: Weights) -> list[Family]:
    """Tensors of the same pattern and shape, in the order of the first of each."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, value in weights.items():
        found.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), value.shape), []).append(name)
    return [Family(pattern, tuple(sorted(names, key=_numbers)), shape) for (pattern, shape), names in found.items()]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _by_values(a: Weights, b: Weights) -> Iterator[Rule]:
    """Rules under which tensors of a are tensors of b to the bit."""
    rules = [
        (family, other, layout)
        for family in families(a)
        for other in families(b)
        if (layout := _moving(family, other, a, b)) is not None
    ]
    for family, other, layout in rules:
        alike = [rule for rule in rules if rule[0] is family or rule[1] is other]
        if len(alike) == 1:  # several tensors of the same values, as norms that are all 1, say nothing
            yield Rule((family.pattern,), (other.pattern,), layout)
    yield from _joined(a, b)


def _moving(a: Family, b: Family, of_a: Weights, of_b: Weights) -> tuple[Op, ...] | None:
    """The first layout that makes each tensor of a family one of another; None if there is none."""
    if len(a.names) != len(b.names):
        return None
    pairs = list(zip(a.names, b.names, strict=True))
    fits = (layout for layout in _layouts(a.shape, b.shape) if all(_equal(of_a[x], layout, of_b[y]) for x, y in pairs))
    return next(fits, None)


def _joined(a: Weights, b: Weights) -> Iterator[Rule]:
    """Neighbours of a that together are a tensor of b, to the bit, and the other way round. What has another number of
    axes, as the biases between weights, is passed over.
    """
    for parts, wholes, swapped in ((a, b, False), (b, a, True)):
        for whole in families(wholes):
            known = [one for one in families(parts) if _may_be_part(one, whole)]
            for start, count in itertools.product(range(len(known)), (2, 3)):
                run = known[start : start + count]
                rule = _join(run, whole, parts, wholes) if len(run) == count else None
                if rule is not None:
                    yield rule.inverse() if swapped else rule


def _may_be_part(part: Family, whole: Family) -> bool:
    return len(part.names) == len(whole.names) and len(part.shape) == len(whole.shape)


def _join(run: Sequence[Family], whole: Family, parts: Weights, wholes: Weights) -> Rule | None:
    for transposed in (False, True) if len(whole.shape) == 2 else (False,):
        target = whole.shape[::-1] if transposed else whole.shape
        for axis in range(len(target)):
            sizes = tuple(family.shape[axis] for family in run)
            others = {tuple(np.delete(family.shape, axis)) for family in run} | {tuple(np.delete(target, axis))}
            if sum(sizes) != target[axis] or len(others) > 1:
                continue
            layout = (Op("transpose"),) if transposed else ()
            joined = [np.concatenate([parts[f.names[n]] for f in run], axis) for n in range(len(whole.names))]
            if all(_equal(own, layout, wholes[name]) for own, name in zip(joined, whole.names, strict=True)):
                equal = len(set(sizes)) == 1
                return Rule(tuple(f.pattern for f in run), (whole.pattern,), layout, axis, () if equal else sizes)
    return None


def _by_shapes(a: Weights, b: Weights) -> Iterator[list[Rule]]:
    """For each family of a the rules that its shape allows, those of similar names first.

    Raises:
        UserError: tensors without a counterpart.
    """
    families_a, families_b = families(a), families(b)
    fits = {family: [other for other in families_b if _may_be(family, other)] for family in families_a}
    alone = [family.pattern for family in families_a if not fits[family]]
    alone += [other.pattern for other in families_b if not any(other in known for known in fits.values())]
    if alone:
        raise UserError(f"{', '.join(alone)}: no tensor of the other side has its shape and number; a rule is needed")
    for family in families_a:
        ordered = sorted(fits[family], key=lambda other, own=family: -_likeness(own.pattern, other.pattern))
        yield [
            Rule((family.pattern,), (other.pattern,), layout)
            for other in ordered
            for layout in _orientations(family.shape, other.shape)
        ]


def _probed(found: Sequence[Rule], choices: Sequence[Sequence[Rule]], probe: Probe | None) -> list[Rule]:
    """The only combination of choices that a probe accepts.

    Raises:
        UserError: no probe, none that it accepts, or too many to try.
    """
    said = "\n  ".join(f"{options[0].a[0]}: {', '.join(dict.fromkeys(map(_right, options)))}" for options in choices)
    if probe is None:
        raise UserError(f"shapes leave a choice, which a probe would settle:\n  {said}")
    tried = 0
    for chosen in itertools.product(*choices):
        targets = [rule.b for rule in chosen]
        if len(set(targets)) < len(targets):
            continue
        tried += 1
        if tried > MOST_TRIALS:
            break
        if probe(Map((*found, *chosen))):
            return list(chosen)
    raise UserError(f"of {min(tried, MOST_TRIALS)} maps that shapes allow the probe accepts none:\n  {said}")


def _right(rule: Rule) -> str:
    return " ".join([rule.b[0], *(f"({op})" for op in rule.layout)])


def _orientations(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[Op, ...]]:
    """Every order of axes that makes one shape the other, the usual ones first: as it is, the last two exchanged, and
    for convolutions from channels first to channels last and back.
    """
    if len(a) != len(b) or len(a) > MOST_AXES:
        return [()] if a == b else []
    axes = tuple(range(len(a)))
    usual = [axes, (*axes[:-2], *axes[:-3:-1]), (*axes[2:], *axes[1::-1]), (*axes[:-3:-1], *axes[:-2])]
    orders = dict.fromkeys([*usual, *itertools.permutations(axes)])
    return [_turned(order) for order in orders if tuple(a[axis] for axis in order) == b]


def _turned(order: tuple[int, ...]) -> tuple[Op, ...]:
    axes = tuple(range(len(order)))
    if order == axes:
        return ()
    return (Op("transpose"),) if order == (*axes[:-2], *axes[:-3:-1]) else (Op("permute", order),)


def _layouts(a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[tuple[Op, ...]]:
    """What may make a tensor of one shape one of the other: the simplest first."""
    rotary = [
        parse_op(f"{name} {heads} axis=0")
        for heads in range(1, HEADS + 1)
        if a and a[0] % (2 * heads) == 0 and a[0] > 2 * heads
        for name in ("interleave", "halves")
    ]
    for turned in _orientations(a, b):
        yield turned
    for turned in _orientations(a, b):
        yield from ((op, *turned) for op in rotary)
    if len(a) + 1 == len(b):
        for axis in range(len(a)):
            if a[:axis] == b[:axis] and a[axis] == b[axis] * b[axis + 1] and a[axis + 1 :] == b[axis + 2 :]:
                yield (Op("split", (b[axis],), axis),)
            if (
                len(a) == 2
                and (turned := a[::-1])
                and turned[:axis] == b[:axis]
                and turned[axis] == b[axis] * b[axis + 1]
            ):
                yield (Op("transpose"), Op("split", (b[axis],), axis))
    if len(a) == len(b) + 1:
        for op in (op for layout in _layouts(b, a) for op in layout if len(layout) == 1):
            yield (op.inverse(),)


def _may_be(a: Family, b: Family) -> bool:
    return len(a.names) == len(b.names) and bool(_orientations(a.shape, b.shape))


def _equal(value: np.ndarray, layout: Sequence[Op], other: np.ndarray) -> bool:
    """Whether a tensor, laid out anew, is another one to the bit."""
    if value.size != other.size or value.dtype != other.dtype:
        return False
    for op in layout:
        value = op.apply(value)
    return value.shape == other.shape and value.tobytes() == np.ascontiguousarray(other).tobytes()


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _names(patterns: Sequence[str], weights: Weights) -> list[str]:
    return [name for family in families(weights) if family.pattern in patterns for name in family.names]


def _without(weights: Weights, names: set[str]) -> dict[str, np.ndarray]:
    return {name: value for name, value in weights.items() if name not in names}
