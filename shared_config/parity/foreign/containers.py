"""Tensors in what functions take and give: tuples, lists, mappings, dataclasses and None, nested in any way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

OUTPUT = "output"
"""Name of what a function or a whole module puts out."""
INPUT = "@in"
"""End of the name of a tensor that a module was given and that no module before it put out as it is."""
ARGUMENT = "input."
"""Start of the name of the gradient of something that a function is called with."""
CALL = "@"
"""Between the name of what was recorded several times and the number of the time, from 0."""


def map_tensors(function: Callable[[str, Any], Any], value: object, name: str, is_tensor: Callable[[Any], bool]) -> Any:
    """The value with ``function(name, tensor)`` in place of each tensor; containers are made anew, the rest is kept.

    Args:
        name: of the value; that of a tensor within has its keys, fields or places added, unless it is the only one.
    """
    alone = sum(1 for _ in tensors_in(value, is_tensor)) == 1
    return _mapped(function, value, name, is_tensor, alone)


def tensors_in(value: object, is_tensor: Callable[[Any], bool], name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and tensor of every tensor of a value, in order."""
    if is_tensor(value):
        yield name, value
    for key, part in _parts(value):
        yield from tensors_in(part, is_tensor, f"{name}.{key}" if name else str(key))


def named_leaves(value: object, name: str, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Every tensor of a value by the name that `map_tensors` gives it."""
    found: dict[str, Any] = {}

    def keep(leaf: str, tensor: Any) -> Any:
        found[leaf] = tensor
        return tensor

    map_tensors(keep, value, name, is_tensor)
    return found


def numbered(names: list[str]) -> list[str]:
    """The names in their order; of those that occur several times, the number of the time is added: "f@0", "f@1"."""
    totals: dict[str, int] = {}
    for name in names:
        totals[name] = totals.get(name, 0) + 1
    seen: dict[str, int] = {}
    found = []
    for name in names:
        place = seen[name] = seen.get(name, -1) + 1
        found.append(call_name(name, place) if totals[name] > 1 else name)
    return found


def call_name(name: str, call: int) -> str:
    """Name of one of several recordings; the input of a module keeps its end: "f@in" is "f@1@in"."""
    own = name.removesuffix(INPUT)
    return f"{own}{CALL}{call}{name[len(own) :]}"


def in_pairs(array: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs of real ones, along a last axis."""
    return np.stack([np.real(array), np.imag(array)], axis=-1)


def listed(value: object) -> object:
    """A list of what a generator, or another iterator, gives; any other value is itself."""
    return list(value) if isinstance(value, Iterator) else value


def _parts(value: object) -> list[tuple[Any, Any]]:
    if value is None or isinstance(value, bool | int | float | str):
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)) is not None:
        return [(field, getattr(value, field)) for field in fields]
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _mapped(function: Callable[[str, Any], Any], value: Any, name: str, is_tensor: Callable[[Any], bool], alone: bool):
    if is_tensor(value):
        return function(name, value)
    parts = {
        key: _mapped(function, part, name if alone else f"{name}.{key}", is_tensor, alone)
        for key, part in _parts(value)
    }
    if not parts or all(new is old for new, (_, old) in zip(parts.values(), _parts(value), strict=True)):
        return value
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, part in parts.items():
            changed[key] = part
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts.values())
    if isinstance(value, tuple | list):
        return type(value)(parts.values())
    changed = copy.copy(value)
    for key, part in parts.items():
        object.__setattr__(changed, key, part)
    return changed
