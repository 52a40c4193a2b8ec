"""The arithmetic of a program: the cost of the matrix products in its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

PRODUCTS = ("dot_general", "ragged_dot_general")


def product_flops(jaxpr: Jaxpr, platform: str) -> int:
    """Multiplications and additions of all matrix products, on all devices together, of a program that is lowered for
    a platform. Rows of no group count too in grouped products; a loop of unknown trip count counts as one iteration.
    """
    platforms: dict[Var, Sequence[Collection[str] | None]] = {
        equation.outvars[0]: equation.params["platforms"]
        for equation in jaxpr.eqns
        if equation.primitive.name == "platform_index"
    }
    return sum(_flops(equation, platform, platforms) for equation in jaxpr.eqns)


def _flops(equation: JaxprEqn, platform: str, platforms: Mapping[Var, Sequence[Collection[str] | None]]) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return _product(equation)
    if name == "cond":
        index, ways = equation.invars[0], [product_flops(way.jaxpr, platform) for way in params["branches"]]
        known = None if isinstance(index, Literal) else platforms.get(index)
        return max(ways) if known is None else ways[_place(known, platform)]
    inner = sum(product_flops(each, platform) for value in params.values() for each in _jaxprs(value))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        (mapped,) = (axes for name, axes in params.items() if name.endswith("manual_axes"))
        return inner * math.prod(params["mesh"].shape[axis] for axis in mapped)
    return inner


def _place(platforms: Sequence[Collection[str] | None], platform: str) -> int:
    """Of the branch for a platform; None stands for all others."""
    return next(place for place, names in enumerate(platforms) if names is None or platform in names)


def _product(equation: JaxprEqn) -> int:
    """2 for each pair of a place of the left factor and one along the free axes of the right one."""
    avals: list[Any] = [variable.aval for variable in equation.invars[:2]]
    left, right = (aval.shape for aval in avals)
    if equation.primitive.name == "dot_general":
        (_, contracted), (_, shared) = equation.params["dimension_numbers"]
        groups = ()
    else:
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, shared) = numbers.dot_dimension_numbers
        groups = numbers.rhs_group_dimensions
    bound = {*contracted, *shared, *groups}
    return 2 * math.prod(left) * math.prod(size for axis, size in enumerate(right) if axis not in bound)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """Of loops, checkpoints, custom derivatives, jitted and mapped functions."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _jaxprs(each)
