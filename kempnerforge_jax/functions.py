"""Modules of NNX, Linen, Equinox and Haiku, and plain functions, as functions of their parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

from kempnerforge_jax.program import MARK, WITHIN, path_name
from kempnerforge_jax.taps import is_array, is_inexact, named
from shared_config.errors import UserError
from shared_config.parity.foreign.containers import INPUT, listed, map_tensors, tensors_in

_Tree = Any

Apply = Callable[[_Tree, _Tree, _Tree], object]
STATEFUL = ("params", "state")
"""Keys of the weights of a Haiku function that has a state."""


class Transformed(Protocol):
    """What Haiku makes of a function."""

    @property
    def apply(self) -> Callable[..., object]:
        """The function of parameters, perhaps a state, perhaps a key, and inputs."""
        ...


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
            with linen.intercept_methods(_interceptor(lambda module: ".".join(module.path), inputs)):
                bound = function.bind({**rest, "params": tree}, mutable=[*rest])
                return _called(bound, inputs)

        return apply, weights["params"], rest
    if is_callable_tree(function):
        own = jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, function)
        return lambda tree, _, inputs: _call_modules(_joined(tree, function), inputs), own, None
    if _is_haiku(function):
        return _of_haiku(function, weights)
    if weights is None:
        return lambda _, __, inputs: _seen(function, inputs), {}, None
    return lambda tree, _, inputs: _seen(function, inputs, tree), weights, None


def is_callable_tree(function: object) -> bool:
    """Whether a callable holds its own arrays, as modules of Equinox do."""
    plain = isinstance(function, nnx.Module | linen.Module)
    return not plain and any(map(is_array, jax.tree.leaves(function)))


def bare(function: object) -> object:
    """What a transformation of Equinox, as filter_jit, was made of, if it holds arrays; else the function itself."""
    while is_callable_tree(function) and (within := getattr(function, "__wrapped__", None)) is not None:
        function = within
    return function


def _joined(arrays: Any, function: Any) -> Any:
    """A callable tree with arrays in place of its own; what else it holds, as functions and flags, is its own."""
    return jax.tree.map(
        lambda array, own: own if array is None else array, arrays, function, is_leaf=lambda x: x is None
    )


def _is_haiku(function: Any) -> bool:
    haiku = sys.modules.get("haiku")
    return haiku is not None and isinstance(function, haiku.Transformed | haiku.TransformedWithState)


def _of_haiku(function: Any, weights: Mapping[str, object] | None) -> tuple[Apply, _Tree, _Tree]:
    """`taken_apart` of a pair of Haiku's, which is called without a key; of one with a state, for its output."""
    if weights is None:
        raise UserError("weights: a function of Haiku needs its parameters, as its init makes them")
    key = (None,) if "rng" in inspect.signature(function.apply).parameters else ()
    if isinstance(function, sys.modules["haiku"].Transformed):
        return lambda tree, _, inputs: _seen(function.apply, inputs, tree, *key), weights, None
    if set(weights) != set(STATEFUL):
        raise UserError(
            f"weights = {', '.join(weights)}: of a Haiku function with a state must be {', '.join(STATEFUL)}"
        )

    def apply(tree: Any, state: Any, inputs: Any) -> object:
        output: Any = _seen(function.apply, inputs, tree, state, *key)
        return output[0]

    return apply, weights["params"], weights["state"]


def _seen(function: Any, inputs: Any, *first: Any) -> object:
    """The output of a function; modules of Haiku within, if there are some, are named."""
    haiku = sys.modules.get("haiku")
    if haiku is None:
        return _called(function, inputs, *first)
    with haiku.intercept_methods(_interceptor(_names_in_haiku(haiku.get_params), inputs, haiku.get_params)):
        return _called(function, inputs, *first)


def _names_in_haiku(parameters: Callable[[], Any]) -> Callable[[Any], str]:
    """Module -> its name, with a mark of the transformed function that it is in: `program.marked_names` says where the
    parameters of that come from, for those of a `layer_stack` are another function's.
    """
    marked: dict[int, tuple[int, Any]] = {}

    def name_of(module: Any) -> str:
        name = path_name([module.module_name])
        path, first = next(iter(jax.tree_util.tree_flatten_with_path(parameters())[0]), ((), None))
        if first is None:
            return name
        if id(first) not in marked:
            marked[id(first)] = len(marked), first  # as long as it is there, nothing else has its id
            checkpoint_name(first, f"{MARK}{marked[id(first)][0]}{MARK}{path_name(path)}")
        return f"{MARK}{marked[id(first)][0]}{WITHIN}{name}"

    return name_of


def _interceptor(
    name_of: Callable[[Any], str], inputs: Any, parameters: Callable[[], Any] = lambda: None
) -> Callable[..., object]:
    """What Linen and Haiku let stand before each method: it names what modules put out, and what they are given.

    Args:
        parameters: those that some modules put out as they are, which is not shown.
    """
    shown: dict[int, Any] = {id(array): array for _, array in tensors_in(inputs, is_array)}
    active: set[int] = set()

    def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> object:
        name, own = name_of(context.module) if context.method_name == "__call__" else "", id(context.module)
        if not name or own in active:
            return following(*args, **kwargs)
        active.add(own)
        try:
            args, kwargs = _shown_inputs(name, (args, kwargs), shown)
            output, known = following(*args, **kwargs), {id(leaf) for leaf in jax.tree.leaves(parameters())}
            put_out = [id(array) for _, array in tensors_in(output, is_array)]
            return output if known.issuperset(put_out) else _shown_output(name, output, shown)
        finally:
            active.discard(own)

    return intercept


def _call_modules(root: Any, inputs: Any) -> object:
    """The output of a module, with the outputs of those within, and what they are given, named by their paths.

    Copies that a transformation of Equinox makes of modules (filter_jit, filter_checkpoint, a scan over stacked layers)
    have names that begin with a mark, and `program.marked_names` says whose copies they are.
    """
    names = {id(module): name for name, module in _modules(root, "") if name}
    copies: list[Any] = []
    shown: dict[int, Any] = {id(array): array for _, array in tensors_in(inputs, is_array)}
    active: set[int] = {id(root)}

    def name_of(module: Any) -> str | None:
        if id(module) not in names and id(module) not in active:
            names.update(_marked(module, len(copies)))
            copies.append(module)  # as long as it is there, nothing else has its id
        return names.get(id(module))

    def watched(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = name_of(self)
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


def _marked(module: Any, number: int) -> dict[int, str]:
    """Names of a copy and of the modules within it; the first array of the copy is marked as such.

    A copy without arrays has none.
    """
    tree = nnx.state(module, nnx.Param) if isinstance(module, nnx.Module) else module
    arrays = [(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if is_array(leaf)]
    if not arrays:
        return {}
    path, first = arrays[0]
    checkpoint_name(first, f"{MARK}{number}{MARK}{path_name(path)}")
    return {id(part): name for name, part in _modules(module, f"{MARK}{number}")}


def _shown_inputs(name: str, given: Any, shown: dict[int, Any]) -> Any:
    def is_new(value: object) -> bool:
        return is_array(value) and is_inexact(value) and id(value) not in shown

    return map_tensors(lambda leaf, array: _shown(leaf, array, shown), given, f"{name}{INPUT}", is_new)


def _shown_output(name: str, output: Any, shown: dict[int, Any]) -> Any:
    return map_tensors(lambda leaf, array: _shown(leaf, array, shown), output, name, is_array)


def _shown(name: str, array: Any, shown: dict[int, Any]) -> Any:
    result = named(array, name)
    shown[id(result)] = result
    return result


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
        return listed(function(*first, **arguments))
    return listed(function(*first, *arguments))
