"""Names and layouts of one implementation in terms of another: a map, as a small TOML file or built in Python.

    [[weights]]
    a = "model.layers.*.self_attn.q_proj.weight"
    b = "layers.*.wq"
    layout = ["halves 4 axis=0", "transpose"]            # what makes b's tensor of a's: `layout`

    [[weights]]                                          # several to one: concatenated along an axis, in this order
    a = ["layers.*.gate.weight", "layers.*.up.weight"]
    b = "layers.*.gate_up"
    axis = 0
    sizes = [32, 32]                                     # needed on the way back, where they are not all equal

    [[weights]]                                          # stars that b lacks: stacked in the order of their numbers
    a = "layers.*.norm.weight"
    b = "layers.norm"

    [[activations]]
    a = "model.layers.*.mlp"
    b = "layers.*.ffn"

    [[activations]]                                      # layers of a, a scan over stacked ones in b
    a = "model.layers.*.mlp"
    b = "layers.ffn@*"

A star stands for any text without a dot, behind "@" for the number of a time. What no rule names keeps its name and
layout. Rules of weights hold for parameters, their gradients and updates, and for what the two are called with, as
``input.0`` or ``input.NAME`` (images, of which one has channels last); those of activations for activations and their
gradients.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike, written_aside
from shared_config.interchange.toml import read_fields
from shared_config.parity.foreign.containers import CALL
from shared_config.parity.foreign.layout import Op, parse_op
from shared_config.parity.foreign.renamed import Values, renamed_meta
from shared_config.parity.traces import COTANGENT, FORWARD, GRADIENT, ROUTES, ROUTING, UPDATED, Summary, Trace

WEIGHTS, ACTIVATIONS = "weights", "activations"
SECTION_OF = {FORWARD: ACTIVATIONS, ROUTING: ACTIVATIONS, COTANGENT: ACTIVATIONS, GRADIENT: WEIGHTS, UPDATED: WEIGHTS}
"""Group of a trace's tensors -> the rules that hold for it."""
END = re.compile(rf"({CALL}[^.]*)?({re.escape(ROUTES)})?$")
FIELDS = ("a", "b", "layout", "axis", "sizes")


@dataclass(frozen=True)
class Rule:
    """Tensors of a, concatenated along an axis, moved, and divided along it, are tensors of b.

    Attributes:
        a, b: patterns with the same stars, or b has none: then a's are stacked.
        layout: operations from a to b.
        axis: of concatenation.
        sizes: of the parts along it; () where they are equal.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    layout: tuple[Op, ...] = ()
    axis: int = 0
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        stars = {pattern.count("*") for pattern in (*self.a, *self.b)}
        of_a, of_b = ({pattern.count("*") for pattern in side} for side in (self.a, self.b))
        if not self.a or not self.b or len(of_a) != 1 or len(of_b) != 1:
            raise UserError(f"{self}: patterns of one side must have the same number of stars")
        if len(stars) > 1 and not (self.stacks or self.unstacks):
            raise UserError(
                f"{self}: both sides must have the same number of stars, or one side one and the other none"
            )
        if len(self.a) > 1 and len(self.b) > 1:
            raise UserError(f"{self}: one side must be a single pattern")
        if max(len(self.a), len(self.b)) > 1 and len(stars) > 1:
            raise UserError(f"{self}: what is concatenated can't be stacked in the same rule")
        if self.sizes and len(self.sizes) != max(len(self.a), len(self.b)):
            raise UserError(f"{self}: sizes = {list(self.sizes)}: must be one for each part")

    def __str__(self) -> str:
        return f"{' + '.join(self.a)} -> {' + '.join(self.b)}"

    @property
    def stacks(self) -> bool:
        """Whether one tensor of b holds those of a for all values of a star."""
        return self.a[0].count("*") == 1 and self.b[0].count("*") == 0

    @property
    def unstacks(self) -> bool:
        """Whether one tensor of a holds those of b for all values of a star."""
        return self.b[0].count("*") == 1 and self.a[0].count("*") == 0

    def inverse(self) -> Rule:
        """The rule from b to a."""
        return Rule(self.b, self.a, tuple(op.inverse() for op in reversed(self.layout)), self.axis, self.sizes)

    def fields(self) -> dict[str, object]:
        """As TOML has them."""
        sides = {name: side[0] if len(side) == 1 else list(side) for name, side in (("a", self.a), ("b", self.b))}
        shown: dict[str, object] = {**sides, "layout": list(map(str, self.layout))}
        shown |= {"axis": self.axis} if max(len(self.a), len(self.b)) > 1 else {}
        shown |= {"sizes": list(self.sizes)} if self.sizes else {}
        return {name: value for name, value in shown.items() if value != []}


@dataclass(frozen=True)
class Map:
    """Names and layouts of b in terms of a.

    Attributes:
        weights: rules for parameters.
        activations: rules for activations.
    """

    weights: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()

    def inverse(self) -> Map:
        """The map from b to a."""
        return Map(*(tuple(rule.inverse() for rule in rules) for rules in (self.weights, self.activations)))

    def apply(self, state: Values, section: str = WEIGHTS) -> dict[str, np.ndarray | Summary]:
        """The tensors of a as those of b: names, layouts, and the bits they had.

        Raises:
            UserError: every tensor that a rule can't move, in one error.
        """
        return applied(state, getattr(self, section), section)

    def apply_to_trace(self, trace: Trace) -> Trace:
        """A trace of a with the names and layouts of b. Deltas follow the names; of tensors whose layout changes, or
        that are put together, those of parts are left out, but for the scale, which no layout changes.
        """
        tensors: dict[str, np.ndarray | Summary] = {}
        renamed: dict[str, tuple[str, ...]] = {}
        for group in dict.fromkeys(name.partition("/")[0] for name in trace.tensors):
            own = {name.partition("/")[2]: t for name, t in trace.tensors.items() if name.partition("/")[0] == group}
            section = SECTION_OF.get(group)
            rules = getattr(self, section) if section else ()
            sources: dict[str, tuple[str, ...]] = {}
            moved = applied(own, with_ends(rules, own) if section == ACTIVATIONS else rules, group, sources)
            for name, tensor in moved.items():
                full = f"{group}/{name}".rstrip("/")
                tensors[full] = tensor
                renamed[full] = tuple(f"{group}/{source}".rstrip("/") for source in sources[name])
        return Trace(tensors, renamed_meta(trace, tensors, renamed))

    def write(self, path: PathLike) -> None:
        """Write the map as TOML, atomically.

        Raises:
            UserError: the file can't be written.
        """
        sections = {name: [rule.fields() for rule in getattr(self, name)] for name in (WEIGHTS, ACTIVATIONS)}
        with written_aside(path) as aside:
            aside.write_text(tomli_w.dumps({name: rules for name, rules in sections.items() if rules}), "utf-8")


def make_map(
    weights: Mapping[str, str | Sequence[str]] | None = None,
    activations: Mapping[str, str | Sequence[str]] | None = None,
) -> Map:
    """A map from tables: pattern of a -> pattern of b, or that and operations: ``{"w": ("v", "transpose")}``.

    Raises:
        UserError: a rule that can't be.
    """
    return Map(*(tuple(_rule_of(a, b) for a, b in (table or {}).items()) for table in (weights, activations)))


def read_map(path: PathLike) -> Map:
    """A map from its TOML file.

    Raises:
        UserError: it can't be read, or every rule that can't be, in one error.
    """
    fields, problems = read_fields(Path(path)), []
    sections: dict[str, list[Rule]] = {WEIGHTS: [], ACTIVATIONS: []}
    for name, entries in fields.items():
        if name not in sections or not isinstance(entries, list):
            problems.append(f"{name}: must be [[{WEIGHTS}]] or [[{ACTIVATIONS}]]")
            continue
        for place, entry in enumerate(entries):
            try:
                sections[name].append(_rule_from(entry))
            except UserError as error:
                problems.append(f"{name}, entry {place + 1}: {error}")
    if problems:
        raise UserError("\n  ".join([f"{path}: is no map:", *problems]))
    return Map(tuple(sections[WEIGHTS]), tuple(sections[ACTIVATIONS]))


def matches(pattern: str, names: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Names that fit a pattern, by what its stars stand for."""
    first, *others = pattern.split("*")
    stars = (rf"([^.{CALL}]+)" if piece.endswith(CALL) else "([^.]+)" for piece in (first, *others))
    regex = re.compile(re.escape(first) + "".join(map("".join, zip(stars, map(re.escape, others), strict=False))))
    found = {name: regex.fullmatch(name) for name in names}
    return {match.groups(): name for name, match in found.items() if match is not None}


def filled(pattern: str, stars: Sequence[str]) -> str:
    """The name that a pattern stands for."""
    return "".join(piece + star for piece, star in zip(pattern.split("*"), [*stars, ""], strict=True))


def with_ends(rules: Sequence[Rule], names: Iterable[str]) -> list[Rule]:
    """The rules, also for inputs, repeated calls and choices of what they name; those that name these come first, but
    for the number of a time that a star stands for.
    """
    ends = dict.fromkeys(END.search(name)[0] for name in names)  # type: ignore[index]
    given = [rule for rule in rules if any(CALL in pattern for pattern in (*rule.a, *rule.b))]
    times = [rule for rule in given if all(one.partition(CALL)[2] in ("", "*") for one in (*rule.a, *rule.b))]
    kinds = dict.fromkeys(re.sub(rf"{CALL}\d+", "", end) for end in ends)
    plain = [rule for rule in rules if rule not in given]
    return [
        *(rule for rule in given if rule not in times),
        *(_with_end(rule, kind) for kind in kinds for rule in times),
        *(_with_end(rule, end) for end in ends for rule in plain),
    ]


def _with_end(rule: Rule, end: str) -> Rule:
    return dataclasses.replace(rule, a=tuple(one + end for one in rule.a), b=tuple(one + end for one in rule.b))


def applied(
    state: Values, rules: Sequence[Rule], what: str, sources: dict[str, tuple[str, ...]] | None = None
) -> dict[str, np.ndarray | Summary]:
    """Tensors moved by rules, in the order of the state.

    Args:
        sources: filled with the names that each new tensor comes from.

    Raises:
        UserError: as `Map.apply`.
    """
    problems: list[str] = []
    places = {name: place for place, name in enumerate(state)}
    made: list[tuple[int, str, np.ndarray | Summary, tuple[str, ...]]] = []
    taken: set[str] = set()
    for rule in rules:
        for names, targets in _uses(rule, {name: state[name] for name in state if name not in taken}):
            missing = [name for name in names if name not in state]
            if missing:
                problems.append(f"{rule}: missing {', '.join(missing)}")
                continue
            taken.update(names)
            try:
                parts = _moved(rule, [state[name] for name in names], len(targets))
            except (ValueError, IndexError) as error:
                problems.append(f"{', '.join(names)}: {error}")
                continue
            first = max(places[name] for name in names)
            made += [(first, target, part, names) for target, part in zip(targets, parts, strict=True)]
    made += [(places[name], name, state[name], (name,)) for name in state if name not in taken]
    result: dict[str, np.ndarray | Summary] = {}
    for _, name, tensor, names in sorted(made, key=lambda one: one[0]):
        if name in result:
            problems.append(f"{name}: comes from several tensors, the last of them {', '.join(names)}")
        result[name] = tensor
        if sources is not None:
            sources[name] = names
    if problems:
        raise UserError("\n  ".join([f"{what}: the map does not fit:", *problems]))
    return result


def _uses(rule: Rule, state: Values) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(names of a, names of b) of everything that a rule moves at once."""
    found = [matches(pattern, state) for pattern in rule.a]
    stars = list(dict.fromkeys(star for each in found for star in each))
    if rule.stacks and stars:
        ordered = sorted(stars, key=lambda star: (not star[0].isdigit(), int(star[0]) if star[0].isdigit() else 0))
        yield tuple(filled(rule.a[0], star) for star in ordered), rule.b
    elif rule.unstacks:
        for name in found[0].values():
            yield (name,), tuple(filled(rule.b[0], [str(place)]) for place in range(state[name].shape[0]))
    else:
        for star in stars:
            yield tuple(filled(pattern, star) for pattern in rule.a), tuple(filled(one, star) for one in rule.b)


def _moved(rule: Rule, tensors: Sequence[np.ndarray | Summary], count: int) -> list[np.ndarray | Summary]:
    """What a rule makes of tensors: ``count`` of them."""
    if len(rule.a) == len(rule.b) == 1 and not rule.layout and not rule.stacks and not rule.unstacks:
        return list(tensors)
    if any(isinstance(tensor, Summary) for tensor in tensors):
        raise ValueError("a summary can't be moved; whole tensors are needed")
    arrays = [np.asarray(tensor) for tensor in tensors]
    if rule.stacks:
        return [np.stack([_laid_out(array, rule.layout) for array in arrays])]
    if rule.unstacks:
        return [_laid_out(array, rule.layout) for array in arrays[0]]
    whole = _laid_out(np.concatenate(arrays, rule.axis) if len(arrays) > 1 else arrays[0], rule.layout)
    if count == 1:
        return [whole]
    sizes = rule.sizes or (whole.shape[rule.axis] // count,) * count
    if sum(sizes) != whole.shape[rule.axis]:
        raise ValueError(f"axis {rule.axis} of {whole.shape}: must be the sum of sizes = {list(sizes)}")
    return [np.ascontiguousarray(part) for part in np.split(whole, np.cumsum(sizes)[:-1], rule.axis)]


def _laid_out(array: np.ndarray, layout: Sequence[Op]) -> np.ndarray:
    for op in layout:
        array = op.apply(array)
    return array


def _rule_of(a: str, b: str | Sequence[str]) -> Rule:
    target, *layout = (b,) if isinstance(b, str) else b
    return Rule((a,), (target,), tuple(map(parse_op, layout)))


def _rule_from(entry: Any) -> Rule:
    unknown = set(entry) - set(FIELDS) if isinstance(entry, dict) else {str(entry)}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: must be one of {', '.join(FIELDS)}")
    sides = [_texts(entry, side) for side in ("a", "b")]
    layout = tuple(map(parse_op, _texts(entry, "layout"))) if "layout" in entry else ()
    axis, sizes = entry.get("axis", 0), entry.get("sizes", [])
    if not isinstance(axis, int) or not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
        raise UserError(f"axis = {axis!r}, sizes = {sizes!r}: must be a number and a list of numbers")
    return Rule(sides[0], sides[1], layout, axis, tuple(sizes))


def _texts(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = entry.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} = {value!r}: must be a pattern or a list of patterns")
    return tuple(texts)
