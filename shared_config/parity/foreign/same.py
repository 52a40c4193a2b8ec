"""An assertion for tests: two implementations, in two frameworks, are the same function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import numpy as np

from shared_config.errors import UserError
from shared_config.parity.checks import describe
from shared_config.parity.foreign.compare import compare_functions
from shared_config.parity.foreign.containers import ARGUMENT
from shared_config.parity.foreign.mapping import Map
from shared_config.parity.foreign.transfer import rules_of_inputs, transfer
from shared_config.parity.result import Comparison
from shared_config.parity.traces import Trace

RECORDERS = {
    "torch": "kempnerforge_torch.parity",
    "jax": "kempnerforge_jax.parity",
    "numpy": "shared_config.parity.foreign.numpy_function",
}
"""Framework -> module with its recorder."""
SHOWN = 5
"""Differences that a message lists."""

Inputs = Sequence[object] | Mapping[str, object]
OBSERVERS: list[Callable[[Comparison], None]] = []
"""Called with each comparison that `assert_same_function` makes."""


class Recorder(Protocol):
    """What records a function in one framework."""

    def record(self, function: object, inputs: Inputs, **options: object) -> Trace:
        """Call a function once, and record it."""
        ...


class DifferentError(AssertionError):
    """Two functions are not the same.

    Attributes:
        a, b: their recordings.
        comparison: what was found.
        names: the map between the two.
    """

    def __init__(self, message: str, a: Trace, b: Trace, comparison: Comparison, names: Map | None):
        super().__init__(message)
        self.a, self.b, self.comparison, self.names = a, b, comparison, names


def assert_same_function(
    torch_fn: object,
    jax_fn: object,
    inputs: Inputs,
    *,
    weights: Mapping[str, object] | None = None,
    names: Map | None = None,
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16"),
    backward: bool = True,
    frameworks: tuple[str, str] = ("torch", "jax"),
    seed: int = 0,
) -> None:
    """Both give the same outputs, activations that both name, and gradients: within what rounding does, in each dtype.

    Args:
        torch_fn, jax_fn: modules or functions, as ``record`` of the two frameworks takes them.
        inputs: of the first, as NumPy arrays; of the second too, but for rules of ``names`` for ``input.0`` or
            ``input.NAME``.
        weights: by name, as the first function has them; None where each has its own.
        names: from the names and layouts of the first to those of the second.
        dtypes: in which the two are compared; "float64" is exact to about 1e-12.
        backward: whether gradients are compared; never with NumPy.
        frameworks: of the two, each "torch", "jax" or "numpy".
        seed: of drawn values.

    Raises:
        DifferentError: they are not; the message names the first difference, and its cause where a check confirms one.
        UserError: weights that don't fit, or inputs that one of them can't take.
    """
    backward = backward and "numpy" not in frameworks
    given_a = _weights(torch_fn, weights, frameworks[0])
    given_b = _weights(jax_fn, None if weights is None else transfer(weights, names), frameworks[1])
    inputs_b = _inputs_of_b(inputs, names)
    for dtype in dtypes:
        a, b = (
            recorder(framework).record(
                function, called_with, dtype=dtype, deltas=deltas, seed=seed, **given, **_backward(framework, backward)
            )
            for framework, function, called_with, given, deltas in (
                (frameworks[0], torch_fn, inputs, given_a, True),
                (frameworks[1], jax_fn, inputs_b, {**given_b, "names": names}, False),
            )
        )
        if not a.meta.extra.get("exact", True):
            b = recorder(frameworks[1]).record(
                jax_fn, inputs_b, dtype=dtype, seed=seed, names=names, **given_b, **_backward(frameworks[1], backward)
            )
        found = compare_functions(a, b, names, common=True)
        for observe in OBSERVERS:
            observe(found)
        if not found.equal:
            raise DifferentError(_message(dtype, found), a, b, found, names)


def recorder(framework: str) -> Recorder:
    """The recorder of a framework.

    Raises:
        UserError: no such framework, or one that is not installed.
    """
    if framework not in RECORDERS:
        raise UserError(f"framework = {framework!r}: must be one of {', '.join(RECORDERS)}")
    try:
        return cast(Recorder, importlib.import_module(RECORDERS[framework]))
    except ModuleNotFoundError as error:
        raise UserError(
            f"framework {framework}: the package {error.name} is not installed; "
            f"pip install 'kempnerforge-twin[{framework}]'"
        ) from None


def nest(flat: Mapping[str, object]) -> dict[str, object]:
    """A tree of dicts, and of lists where names are numbers, from dotted names: "layers.0.w" is ["layers"][0]["w"].

    Raises:
        UserError: a name that is both a tensor and a part of other names, or numbers with gaps.
    """
    tree: dict[str, object] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            below = node.setdefault(part, {})
            if not isinstance(below, dict):
                raise UserError(f"{name}: {part} is a tensor of its own")
            node = below
        if last in node:
            raise UserError(f"{name}: is a tensor, and a part of other names")
        node[last] = value
    return {name: _with_lists(part, name) for name, part in tree.items()}


def _with_lists(tree: object, path: str) -> object:
    if not isinstance(tree, dict):
        return tree
    parts = {name: _with_lists(part, f"{path}.{name}") for name, part in tree.items()}
    if not all(name.isdigit() for name in parts):
        return parts
    order = sorted(parts, key=int)
    if [int(name) for name in order] != list(range(len(order))):
        raise UserError(f"{path}: has {', '.join(order)}: must be numbered from 0 without gaps")
    return [parts[name] for name in order]


def _weights(function: object, weights: Mapping[str, object] | None, framework: str) -> dict[str, object]:
    """The weights as a recorder takes them: by name for a module, as a tree for a function."""
    if weights is None:
        return {}
    plain = callable(function) and hasattr(function, "__code__")
    wrapped = hasattr(function, "__wrapped__") or hasattr(function, "func")
    return {"weights": nest(weights) if plain or wrapped or framework == "numpy" else dict(weights)}


def _inputs_of_b(inputs: Inputs, names: Map | None) -> Inputs:
    """What the second is called with: the same, but for names and layouts that the map gives it."""
    rules = rules_of_inputs(names)
    if not rules.weights:
        return inputs
    given = inputs if isinstance(inputs, Mapping) else {str(place): value for place, value in enumerate(inputs)}
    arrays = {f"{ARGUMENT}{key}": value for key, value in given.items() if isinstance(value, np.ndarray)}
    others = {key: value for key, value in given.items() if f"{ARGUMENT}{key}" not in arrays}
    moved = others | {name.removeprefix(ARGUMENT): value for name, value in rules.apply(arrays).items()}
    return moved if isinstance(inputs, Mapping) else [moved[place] for place in given]


def _backward(framework: str, backward: bool) -> dict[str, object]:
    return {} if framework == "numpy" else {"backward": backward}


def _message(dtype: str, found: Comparison) -> str:
    lines = [f"{found.label_a} and {found.label_b} are not the same function in {dtype}"]
    lines += [note for note in found.notes if note.startswith(("forward: ", "backward: ", "cause: ", "where: "))]
    lines += [describe(row, found) for row in found.failures[:SHOWN]]
    more = len(found.failures) - SHOWN
    return "\n  ".join([*lines, *([f"and {more} more"] if more > 0 else [])])
