"""Kinds of attention, which repeat from layer to layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeVar

LayerKind = Literal["full", "window", "full_nope", "window_nope"]
Kind = TypeVar("Kind", bound=str)


def has_window(kinds: Collection[str]) -> bool:
    """Whether layers of one of these kinds have a window."""
    return any(kind.startswith("window") for kind in kinds)


def shortest_pattern(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """What repeated, and cut at the end, gives all."""
    return next(
        tuple(kinds[:length])
        for length in range(1, len(kinds) + 1)
        if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds))
    )


def beside_a_window(kinds: Sequence[str]) -> tuple[str, ...]:
    """What a pattern says that the window of `sliding_window` does not: where all layers have it, as if none had."""
    everywhere = all(has_window([kind]) for kind in kinds)
    return tuple(kind.replace("window", "full") for kind in kinds) if everywhere else tuple(kinds)
