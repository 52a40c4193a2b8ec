"""The collectives in the text of a compiled program (HLO, as XLA prints it)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shared_config.contract.programs import Collective

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<)")
_NUMBER = re.compile(r"\d+")
STARTS = 'custom_call_target="AsyncCollectiveStart"'
"""Marks the fusion that starts an asynchronous collective; the fusions that continue it repeat the collective."""


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str

    def called(self) -> list[str]:
        """The computations that it calls, or may call."""
        branches = [name.strip().lstrip("%") for names in _BRANCHES.findall(self.rest) for name in names.split(",")]
        return [*_CALLED.findall(self.rest), *branches]


@dataclass(frozen=True)
class _Total:
    """Times and bytes by kind, and loops of unknown trip count."""

    count: Mapping[str, int]
    bytes: Mapping[str, int]
    unknown_loops: int = 0

    def plus(self, other: _Total, times: int = 1) -> _Total:
        count, size = Counter(self.count), Counter(self.bytes)
        for kind in other.count:
            count[kind] += other.count[kind] * times
            size[kind] += other.bytes[kind] * times
        return _Total(count, size, self.unknown_loops + other.unknown_loops)


_Computations = Mapping[str, list[_Instruction]]


def collectives_of(text: str) -> tuple[tuple[Collective, ...], int]:
    """The collectives that a device takes part in with others when it runs a program once, the most bytes first; and
    the number of loops with collectives whose trip count is unknown, each of which is counted as one iteration.
    """
    computations, entry = _parsed(text)
    total = _total(computations, entry, {}) if entry else _Total({}, {})
    found = (Collective(kind, count, total.bytes[kind]) for kind, count in total.count.items())
    return tuple(sorted(found, key=lambda each: (-each.bytes, each.kind))), total.unknown_loops


def _parsed(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the one that is run."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found["name"], [])
            entry = found["name"] if found["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found["name"], found["type"], found["opcode"], found["rest"]))
    return computations, entry


def _total(
    computations: _Computations, name: str, known: dict[tuple[str, bool], _Total], fused: bool = False
) -> _Total:
    if (name, fused) in known:
        return known[name, fused]
    total, instructions = _Total({}, {}), computations.get(name, [])
    sizes = {each.name: _bytes(each.type) for each in instructions}
    own = not fused or any(STARTS in each.rest for each in instructions)
    for each in instructions:
        kind = each.opcode.removesuffix("-start")
        if kind in KINDS:
            counts = own and not _ALONE.search(each.rest)
            total = total.plus(_Total({kind: 1}, {kind: _moved(each, sizes)})) if counts else total
        elif each.opcode == "while":
            total = _looped(computations, each, known, total)
        elif each.opcode == "conditional":
            ways = [_total(computations, called, known) for called in each.called()]
            total = total.plus(max(ways, key=lambda way: sum(way.bytes.values()), default=_Total({}, {})))
        elif each.opcode in ("fusion", "call", "async-start"):
            for called in each.called():
                total = total.plus(_total(computations, called, known, fused=each.opcode == "fusion"))
    known[name, fused] = total
    return total


def _looped(
    computations: _Computations, loop: _Instruction, known: dict[tuple[str, bool], _Total], total: _Total
) -> _Total:
    """The total with that of a loop added to it."""
    body = _Total({}, {})
    for called in loop.called():
        body = body.plus(_total(computations, called, known))
    trips = _trips(computations, loop)
    if trips is None and body.count:
        body = dataclasses.replace(body, unknown_loops=body.unknown_loops + 1)
    return total.plus(body, times=1 if trips is None else trips)


def _trips(computations: _Computations, loop: _Instruction) -> int | None:
    """The trip count of a loop: as annotated, or else the only number that its condition compares with."""
    if told := _TRIPS.search(loop.rest):
        return int(told[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
    tests = list(_within(computations, condition[1])) if condition else []
    if not any("direction=LT" in each.rest for each in tests):
        return None
    bounds = [found[0] for each in tests if each.opcode == "constant" and (found := _NUMBER.match(each.rest))]
    return int(bounds[0]) if len(bounds) == 1 else None


def _within(computations: _Computations, name: str) -> Iterator[_Instruction]:
    """The instructions of a computation and of those that it runs."""
    for each in computations.get(name, []):
        yield each
        for called in each.called():
            yield from _within(computations, called)


def _moved(collective: _Instruction, sizes: Mapping[str, int]) -> int:
    """Bytes of the operands or of the results, whichever are more; what is started has both as its result."""
    names = re.findall(r"%([\w.-]+)", collective.rest.partition(")")[0])
    given, result = sum(sizes.get(name, 0) for name in names), _bytes(collective.type)
    both = collective.opcode.endswith("-start") and collective.opcode != "all-reduce-start"
    return max(given, result - given if both else result)


def _bytes(type_: str) -> int:
    """Of all arrays of a type."""
    arrays = ((name, [int(size) for size in sizes.split(",") if size]) for name, sizes in _ARRAY.findall(type_))
    return sum(-(-_bits(name) * math.prod(shape) // 8) for name, shape in arrays)


def _bits(name: str) -> int:
    """Bits of an element of a type: "pred" is a byte, the names of others tell it, as "bf16" and "f8e4m3fn"."""
    digits = re.match(r"[a-z]+(\d+)", name)
    return int(digits[1]) if digits else 8 * (name == "pred")
