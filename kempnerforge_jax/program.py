"""JAX programs that are run step by step, so that named values inside can be seen, and others go on in their place.

A name is what `jax.ad_checkpoint.checkpoint_name` gives; it costs nothing where a program is run as usual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.tree_util import GetAttrKey
from jaxtyping import Shaped

from shared_config.parity.foreign.containers import numbered
from shared_config.parity.traces import COTANGENT

Visit = Callable[[str, Shaped[jax.Array, "..."]], Shaped[jax.Array, "..."]]
Slope = Callable[[Shaped[jax.Array, "..."]], Shaped[jax.Array, "..."]]
Rounded = Callable[[Shaped[jax.Array, "..."]], Shaped[jax.Array, "..."]]

NAME = "name"
MARK = "?"
"""Begins names within the copy of a module that a transformation made: "?3.linear" is the linear of the third copy, and
"?3?linear.weight" names, before it is called, an array of it. "?3/linear" is the linear of a function that was
transformed within another, as by a `layer_stack` of Haiku, and "linear" if nothing says where its parameters come from.
"""
WITHIN = "/"
INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Calls whose body stands in their place where it names something."""
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
"""Calls with a derivative of their own: what they name is seen, and can't be replaced."""
SLOPES: dict[str, Slope] = {
    "tanh": lambda y: (1 - y) * (1 + y),
    "logistic": lambda y: y * (1 - y),
    "expm1": lambda y: 1 + y,
}
"""Operations whose results are subtracted from 1, in their derivatives at least, which are computed from the results:
where these are nearly 1, rounding them leaves few digits of what remains.
"""


def evaluate(
    program: ClosedJaxpr,
    arguments: Sequence[Shaped[jax.Array, "..."]],
    visit: Visit,
    rounded: Rounded | None = None,
) -> list[Shaped[jax.Array, "..."]]:
    """What a program puts out, given flat arguments; each named value is what ``visit(name, value)`` makes of it.

    Loops that name something are unrolled. Branches and loops of unknown length run as they are, unseen.

    Args:
        rounded: makes of the result of one of `SLOPES` what goes on, and what its derivative is computed from; None
            leaves it as it is.
    """
    return _evaluated(program.jaxpr, program.consts, arguments, visit, rounded)


def names_of(program: Jaxpr) -> Iterator[str]:
    """Every name that `evaluate` visits, once for each place in the program."""
    for equation in program.eqns:
        if equation.primitive.name == NAME:
            yield equation.params["name"]
        elif (body := _body(equation)) is not None:
            yield from names_of(body.jaxpr)


def marked_names(program: ClosedJaxpr, arguments: Sequence[str]) -> dict[str, str]:
    """Marks of copies of modules -> paths of the modules, of a program whose flat arguments have names.

    An array of a copy is an argument of the program, whichever jitted and rematerialised parts and scans lie between:
    from its name the path follows, which is "" where it is the name of the array within the copy.
    """
    found: dict[str, str] = {}

    def walk(jaxpr: Jaxpr, origins: dict[Any, str]) -> None:
        for equation in jaxpr.eqns:
            given = [None if isinstance(atom, Literal) else origins.get(atom) for atom in equation.invars]
            if equation.primitive.name == NAME:
                _, mark, path = [*equation.params["name"].split(MARK), "", ""][:3]
                if path and given[0] is not None and f".{given[0]}".endswith(f".{path}"):
                    found[f"{MARK}{mark}"] = given[0].removesuffix(path).rstrip(".")
            elif (body := _body(equation)) is not None:
                walk(body.jaxpr, {own: name for own, name in zip(body.jaxpr.invars, given, strict=True) if name})

    walk(program.jaxpr, dict(zip(program.jaxpr.invars, arguments, strict=True)))
    return found


def readers(program: ClosedJaxpr, arguments: Sequence[str], ends: Callable[[str, int], bool]) -> dict[str, list[str]]:
    """For arguments and named values: the named values that are computed from them, with no other one between.

    Args:
        program: names stand outside of all calls within, as where `evaluate` has named what it visits.
        arguments: their names.
        ends: whether the value with a name, in its call of a number, counts as one.
    """
    names = [equation.params["name"] for equation in program.jaxpr.eqns if equation.primitive.name == NAME]
    left, calls = iter(numbered(names)), dict.fromkeys(names, -1)
    origins: dict[Any, set[str]] = {own: {name} for own, name in zip(program.jaxpr.invars, arguments, strict=True)}
    found: dict[str, list[str]] = {}
    for equation in program.jaxpr.eqns:
        given = set().union(*(origins.get(atom, ()) for atom in equation.invars if not isinstance(atom, Literal)))
        if equation.primitive.name == NAME:
            plain, name = equation.params["name"], next(left)
            calls[plain] += 1
            if ends(plain, calls[plain]):
                for origin in sorted(given):
                    found.setdefault(origin, []).append(name)
                given = {f"{COTANGENT}/{name}"}
        origins |= dict.fromkeys(equation.outvars, given)
    return found


def unmarked(name: str, copies: Mapping[str, str]) -> str | None:
    """The name of a value within a copy as that of what was copied; None of a copy of nothing that is known.

    Args:
        copies: as `marked_names` gives them.
    """
    found = re.match(rf"{re.escape(MARK)}\d+(?![{re.escape(MARK)}\d])", name)
    if not name.startswith(MARK):
        return name
    path, own = (copies.get(found[0], ""), name[found.end() :]) if found else ("", "")
    if own.startswith(WITHIN):
        return f"{path}.{own.removeprefix(WITHIN)}".lstrip(".")
    return f"{path}{own}" if path else None


def path_name(path: Sequence[object]) -> str:
    """A path in a tree, or the name of a module of Haiku, with dots; without the value of a variable of NNX."""
    path = path[:-1] if path[1:] and path[-1] == GetAttrKey("value") else path
    text = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return text.replace("/~/", ".").replace("/", ".").lstrip(".")


def _evaluated(
    jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], visit: Visit, rounded: Rounded | None
) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, _outputs(equation, given, visit, rounded), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, given: list[Any], visit: Visit, rounded: Rounded | None) -> list[Any]:
    name, body = equation.primitive.name, _body(equation)
    if name == NAME:
        return [visit(equation.params["name"], given[0])]
    if name in SLOPES and rounded is not None:
        return [_with_slope(given[0], rounded(*_bound(equation, given)), SLOPES[name])]
    named = body is not None and any(True for _ in names_of(body.jaxpr))
    if body is None or not (named or (rounded is not None and _has_slopes(body.jaxpr))):
        return _bound(equation, given)
    if name == "scan":
        return (_unrolled if named else _scanned)(equation, body, given, visit, rounded)
    if name in CUSTOM:
        evaluate(body, [jax.lax.stop_gradient(value) for value in given], visit)
        return _bound(equation, given)
    return evaluate(body, given, visit, rounded)


def _with_slope(given: Any, result: Any, slope: Slope) -> Any:
    """The result, with the derivative that is computed from it."""
    return passing(jax.lax.stop_gradient(slope(result)) * given, result)


def _has_slopes(program: Jaxpr) -> bool:
    """Whether `evaluate` sees one of `SLOPES`."""
    for equation in program.eqns:
        body = _body(equation)
        if equation.primitive.name in SLOPES or (body is not None and _has_slopes(body.jaxpr)):
            return True
    return False


def _bound(equation: Any, given: list[Any]) -> list[Any]:
    """The equation as it is."""
    parameters, functions = equation.primitive.get_bind_params(equation.params), ()
    if isinstance(parameters, tuple):  # as some versions of jax give them
        functions, parameters = parameters
    found = equation.primitive.bind(*functions, *given, **parameters)
    return list(found) if equation.primitive.multiple_results else [found]


def _unrolled(equation: Any, body: ClosedJaxpr, given: list[Any], visit: Visit, rounded: Rounded | None) -> list[Any]:
    """A scan, step by step."""
    length, fixed, carried = (equation.params[name] for name in ("length", "num_consts", "num_carry"))
    consts, carry, columns = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]
    order = range(length)[::-1] if equation.params["reverse"] else range(length)
    rows: dict[int, list[Any]] = {}
    for step in order:
        found = evaluate(body, [*consts, *carry, *(column[step] for column in columns)], visit, rounded)
        carry, rows[step] = found[:carried], found[carried:]
    stacked = [jnp.stack([rows[step][place] for step in range(length)]) for place in range(len(rows[0]))]
    return [*carry, *stacked]


def _scanned(equation: Any, body: ClosedJaxpr, given: list[Any], visit: Visit, rounded: Rounded | None) -> list[Any]:
    """A scan that names nothing, with one step for all."""
    length, reverse, fixed, carried = (
        equation.params[name] for name in ("length", "reverse", "num_consts", "num_carry")
    )
    consts, carry, columns = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]

    def step(carry: list[Any], columns: list[Any]) -> tuple[list[Any], list[Any]]:
        found = evaluate(body, [*consts, *carry, *columns], visit, rounded)
        return found[:carried], found[carried:]

    carry, stacked = jax.lax.scan(step, carry, columns, length, reverse)
    return [*carry, *stacked]


@jax.custom_jvp
def passing(array: Shaped[jax.Array, "..."], value: Shaped[jax.Array, "..."]) -> Shaped[jax.Array, "..."]:
    """The value, through which gradients go to the array."""
    return value


@passing.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def _body(equation: Any) -> ClosedJaxpr | None:
    """The program within an equation that is run once, or as often as a scan says; None for other equations."""
    name, parameters = equation.primitive.name, equation.params
    if name not in (*INLINED, *CUSTOM, "scan"):
        return None
    found = next((parameters[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in parameters), None)
    return ClosedJaxpr(found, ()) if isinstance(found, Jaxpr) else found
