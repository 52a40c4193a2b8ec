"""Weights of one implementation as those of another, by a map: all of them, or an error that says everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.states import host_array
from shared_config.parity.foreign.containers import ARGUMENT
from shared_config.parity.foreign.mapping import WEIGHTS, Map

Shapes = Mapping[str, Sequence[int]]


def transfer(
    weights: Mapping[str, object], names: Map | None = None, expected: Shapes | None = None
) -> dict[str, np.ndarray]:
    """A state dict moved by a map, bit for bit.

    Args:
        weights: arrays or tensors of any library by name.
        names: from their names and layouts to those that are wanted; None where they are the same.
        expected: shape of every tensor that is wanted; None where anything will do.

    Raises:
        UserError: all that is missing, extra, of another shape, or named by no rule and wanted by nobody, at once.
    """
    arrays = {name: host_array(name, value) for name, value in weights.items()}
    moved = (names or Map()).apply(arrays, WEIGHTS)
    found = {name: value for name, value in moved.items() if isinstance(value, np.ndarray)}
    if expected is not None:
        problems = list(_problems(found, expected, arrays))
        if problems:
            raise UserError("\n  ".join(["weights do not fit:", *problems]))
        found = {name: found[name] for name in expected}
    return found


def rules_of_inputs(names: Map | None) -> Map:
    """The rules of a map for what the two are called with."""
    rules = () if names is None else names.weights
    return Map(tuple(rule for rule in rules if all(name.startswith(ARGUMENT) for name in rule.a)))


def _problems(found: Mapping[str, np.ndarray], expected: Shapes, given: Mapping[str, np.ndarray]) -> Iterator[str]:
    for name in expected:
        if name not in found:
            yield f"{name}: missing, of shape {tuple(expected[name])}"
    for name, value in found.items():
        if name in expected:
            if tuple(expected[name]) != value.shape:
                yield f"{name}: shape = {value.shape}: must be {tuple(expected[name])}"
        elif name in given and value is given[name]:
            yield f"{name}: unread, of shape {value.shape}: no rule of the map names it"
        else:
            yield f"{name}: extra, of shape {value.shape}: the map makes it, and nothing takes it"
