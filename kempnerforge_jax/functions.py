"""Modules of NNX, Linen and others, and plain functions, as functions of their parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

from kempnerforge_jax.taps import is_array, is_floating, tap
from shared_config.errors import UserError
from shared_config.parity.foreign.containers import INPUT, map_tensors, tensors_in

_Tree = Any

Apply = Callable[[_Tree, _Tree, _Tree], object]


def taken_apart(function: object, weights: Mapping[str, object] | None) -> tuple[Apply, _Tree, _Tree]:
    """(parameters, the rest, arguments) -> output; the parameters, and the rest, of a function of any kind."""
    if isinstance(function, nnx.Module):
        graph, parameters, rest = nnx.split(function, nnx.Param, ...)
        return lambda tree, rest, inputs: _call_modules(nnx.merge(graph, tree, rest), inputs), parameters, rest
    if isinstance(function, linen.Module):
        if weights is None:
            raise UserError("weights: a Linen module needs its variables, as its init makes them")
        rest = {name: value for name, value in weights.items() if name != "params"}

        def apply(tree: Any, rest: Any, inputs: Any) -> object:
            with linen.intercept_methods(_intercept):
                bound = function.bind({**rest, "params": tree})
                return _called(bound, inputs)

        return apply, weights["params"], rest
    if is_callable_tree(function, weights):
        return lambda tree, _, inputs: _call_modules(tree, inputs), function, None
    if weights is None:
        return lambda _, __, inputs: _called(function, inputs), {}, None
    return lambda tree, _, inputs: _called(function, inputs, tree), weights, None


def is_callable_tree(function: object, weights: object) -> bool:
    """Whether a callable holds its own arrays, as modules of Equinox do."""
    plain = isinstance(function, nnx.Module | linen.Module)
    return not plain and weights is None and any(map(is_array, jax.tree.leaves(function)))


def _call_modules(root: Any, inputs: Any) -> object:
    """The output of a module, with the outputs of those within, and what they are given, named by their paths."""
    names = {id(module): name for name, module in _modules(root, "") if name}
    shown: dict[int, Any] = {id(array): array for _, array in tensors_in(inputs, is_array)}
    active: set[int] = set()

    def watched(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(self))
            if name is None or id(self) in active:
                return original(self, *args, **kwargs)
            active.add(id(self))
            try:
                args, kwargs = _shown_inputs(name, (args, kwargs), shown)
                return _shown_output(name, original(self, *args, **kwargs), shown)
            finally:
                active.discard(id(self))

        return call

    classes = {type(module) for _, module in _modules(root, "")}
    with contextlib.ExitStack() as restoring:
        for cls in classes:
            own = vars(cls).get("__call__")
            original = cls.__call__
            setattr(cls, "__call__", watched(original))  # noqa: B010
            if own is None:
                restoring.callback(delattr, cls, "__call__")
            else:
                restoring.callback(setattr, cls, "__call__", own)
        return _called(root, inputs)


def _intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
    name = ".".join(context.module.path)
    output = following(*args, **kwargs)
    return tap(name, output) if name and context.method_name == "__call__" else output


def _shown_inputs(name: str, given: Any, shown: dict[int, Any]) -> Any:
    def is_new(value: object) -> bool:
        return is_array(value) and is_floating(value) and id(value) not in shown

    return map_tensors(lambda leaf, array: _shown(leaf, array, shown), given, f"{name}{INPUT}", is_new)


def _shown_output(name: str, output: Any, shown: dict[int, Any]) -> Any:
    return map_tensors(lambda leaf, array: _shown(leaf, array, shown), output, name, is_array)


def _shown(name: str, array: Any, shown: dict[int, Any]) -> Any:
    named = checkpoint_name(array, name)
    shown[id(named)] = named
    return named


def _modules(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every callable module within a value by its dotted path."""
    if isinstance(value, nnx.Module) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        if callable(value):
            yield path, value
        parts = [(name, part) for name, part in vars(value).items() if not name.startswith("_")]
    elif isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        return
    for name, part in parts:
        yield from _modules(part, f"{path}.{name}" if path else str(name))


def _called(function: Any, arguments: Any, *first: Any) -> object:
    if isinstance(arguments, Mapping):
        return function(*first, **arguments)
    return function(*first, *arguments)
