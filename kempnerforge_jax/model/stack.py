"""Stacks: layers of one structure whose arrays lie along a leading axis, and their names.

This file has no twin: torch compiles block by block, and has no use for stacks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from shared_config.interchange import parts
from shared_config.interchange.parts import Parts

_PARAMETER = re.compile(r"layers\.(?P<stack>\d+(?:-\d+(?::\d+)?)?)\.(?P<within>.+)")


Tree = TypeVar("Tree")
Leaf = TypeVar("Leaf")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Stack:
    """Layers that share one module. The name of a stack stands where the number of a single layer would.

    Attributes:
        layers: their numbers. One layer is a stack, too, whose arrays have no leading axis.
    """

    layers: range

    @classmethod
    def named(cls, name: str) -> Stack:
        """The stack "3", "0-31", or "1-31:2" of every second layer from 1 to 31."""
        bounds, _, step = name.partition(":")
        first, _, last = bounds.partition("-")
        return cls(range(int(first), int(last or first) + 1, int(step or 1)))

    @classmethod
    def of(cls, parameter: str) -> Stack | None:
        """The stack that a parameter ("layers.0-31.norm.weight") belongs to; None for one outside the layers."""
        match = _PARAMETER.fullmatch(parameter)
        return None if match is None else cls.named(match["stack"])

    @property
    def name(self) -> str:
        """What `named` reads."""
        if not self.is_stacked:
            return str(self.layers[0])
        step = f":{self.layers.step}" if self.layers.step > 1 else ""
        return f"{self.layers[0]}-{self.layers[-1]}{step}"

    @property
    def is_stacked(self) -> bool:
        """Whether arrays have a leading axis."""
        return len(self.layers) > 1

    def put(self, trees: Sequence[Tree]) -> Tree:
        """One tree of arrays, or abstract ones, from those of its layers, which are given in their order."""
        return jax.tree.map(lambda *arrays: _stacked(arrays), *trees) if self.is_stacked else trees[0]

    def take(self, tree: Tree) -> dict[int, Tree]:
        """What each layer has of a tree of arrays."""
        if not self.is_stacked:
            return {self.layers[0]: tree}
        return {layer: jax.tree.map(operator.itemgetter(i), tree) for i, layer in enumerate(self.layers)}

    def shapes(self, array: Shaped[Array, "..."] | jax.ShapeDtypeStruct) -> dict[int, jax.ShapeDtypeStruct]:
        """Shape and dtype of what `take` gives for an array, without touching it."""
        shape = array.shape[1:] if self.is_stacked else array.shape
        return dict.fromkeys(self.layers, jax.ShapeDtypeStruct(shape, array.dtype))

    def parameter(self, layer: int, parameter: str) -> str:
        """A parameter of the stack, as it is called in one of its layers."""
        return f"layers.{layer}.{_within(parameter)}"

    def map(self, function: Callable[Arguments, Tree]) -> Callable[Arguments, Tree]:
        """The function of a layer's arrays, applied to those of each layer."""
        return jax.vmap(function) if self.is_stacked else function


def stacks_of(parameters: Iterable[str]) -> list[Stack]:
    """The stacks that these parameters belong to, each once."""
    stacks = (Stack.of(name) for name in parameters)
    return list(dict.fromkeys(stack for stack in stacks if stack is not None))


def in_first_layer(parameter: str) -> str:
    """A parameter's name; of one of a stack ("layers.0-31.norm.weight"), that in the first of its layers."""
    stack = Stack.of(parameter)
    return parameter if stack is None else stack.parameter(stack.layers[0], parameter)


def stack_layers(state: Mapping[str, Leaf], stacks: Sequence[Stack]) -> dict[str, Leaf | Shaped[Array, "..."]]:
    """Replace the layers of each stack ("layers.0.x", "layers.1.x") by one array with a leading axis ("layers.0-1.x").

    Args:
        stacks: of `layer_stacks(model)`; one of a single layer stays as it is.
    """
    stack_of = {layer: stack for stack in stacks for layer in stack.layers}
    result: dict[str, Leaf | Shaped[Array, "..."]] = {}
    for name, array in state.items():
        single = Stack.of(name)
        stack = None if single is None else stack_of.get(single.layers[0])
        if stack is None or not stack.is_stacked:
            result[name] = array
            continue
        stacked_name = f"layers.{stack.name}.{_within(name)}"
        if stacked_name not in result:
            result[stacked_name] = stack.put([state[stack.parameter(layer, name)] for layer in stack.layers])
    return result


def unstack_layers(state: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The opposite of `stack_layers`; a state without stacked layers is returned as it is. Layers come in order."""
    return _unstacked(state, Stack.take)


def unstack_shapes(
    state: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `unstack_layers`, without touching the arrays."""
    single = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in state.items()}
    return _unstacked(single, Stack.shapes)


def _unstacked(state: Mapping[str, Any], take: Callable[[Stack, Any], dict[int, Any]]) -> dict[str, Any]:
    if not any(stack.is_stacked for stack in stacks_of(state)):
        return dict(state)
    start = next(i for i, name in enumerate(state) if Stack.of(name) is not None)
    entries: list[tuple[tuple[int, int], str, Any]] = []
    for i, (name, array) in enumerate(state.items()):
        stack = Stack.of(name)
        if stack is None:
            entries.append(((i, 0), name, array))
        else:
            own = take(stack, array)
            entries += [((start, layer), stack.parameter(layer, name), own[layer]) for layer in stack.layers]
    return {name: array for _, name, array in sorted(entries, key=operator.itemgetter(0))}


def _within(parameter: str) -> str:
    """The name of a layer's parameter within the layer."""
    match = _PARAMETER.fullmatch(parameter)
    assert match is not None, f"{parameter} belongs to no layer"
    return match["within"]


def _stacked(arrays: Sequence[Any]) -> Any:
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    if any(isinstance(array, (Parts, np.ndarray)) for array in arrays):
        return parts.stacked(arrays)
    return jnp.stack(arrays)
