"""Covering arrays: few rows of settings in which every two values of two different factors occur together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

CANDIDATES = 20


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True, seed: int = 0
) -> list[Row]:
    """Rows, each with a value for every factor, that together have every pair of values that a row may have.

    Args:
        factors: name -> values, which are hashable.
        allowed: of a row, or of the part of one that has been chosen, whether its values go together.
    """
    rng = random.Random(seed)
    missing = [pair for pair in pairs(factors) if allowed(dict(pair))]
    rows: list[Row] = []
    while missing:
        drawn = [_completed(dict(missing[0]), factors, allowed, set(missing), rng) for _ in range(CANDIDATES)]
        candidates = [row for row in drawn if row is not None]
        if not candidates:
            missing = missing[1:]  # the rest of a row has no values that go with this pair
            continue
        best = max(candidates, key=lambda row: len(covered(row, missing)))
        rows.append(best)
        found = set(covered(best, missing))
        missing = [pair for pair in missing if pair not in found]
    return rows


def pairs(factors: Mapping[str, Sequence[Any]]) -> list[Pair]:
    """Every two values of two factors."""
    return [
        ((left, a), (right, b))
        for left, right in itertools.combinations(factors, 2)
        for a, b in itertools.product(factors[left], factors[right])
    ]


def covered(row: Row, wanted: Sequence[Pair]) -> list[Pair]:
    """The pairs that a row has."""
    return [pair for pair in wanted if all(row[name] == value for name, value in pair)]


def _completed(
    row: Row,
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool],
    missing: set[Pair],
    rng: random.Random,
) -> Row | None:
    """The row with values for all other factors, those that cover most; None where nothing is left that goes along."""
    names = [name for name in factors if name not in row]
    rng.shuffle(names)
    for name in names:
        values = [value for value in factors[name] if allowed({**row, name: value})]
        if not values:
            return None
        rng.shuffle(values)

        def gain(value: Any, name: str = name) -> int:
            new = (name, value)
            return sum((new, old) in missing or (old, new) in missing for old in row.items())

        row[name] = max(values, key=gain)
    return {name: row[name] for name in factors}
