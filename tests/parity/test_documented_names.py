"""Every public name of `kempnerforge.model` is at its place in both backends, with its parameters by name and in order.

`tests/fixtures/api.json` has the names: module -> function -> signature, or module -> class -> its methods' signatures
and its properties.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.parity.backends import on_both

API = json.loads((Path(__file__).parent.parent / "fixtures" / "api.json").read_text(encoding="utf-8"))
IDIOMS = {"torch": set(), "jax": {"rngs"}}
"""Parameters that a backend asks for besides: JAX has no global state to draw weights from."""


class Callable(NamedTuple):
    """What may be called by documented names.

    Attributes:
        positional: names of the parameters, in order.
        keywords: names of those that are given by name alone.
        optional: names of those that have a default.
    """

    positional: tuple[str, ...]
    keywords: frozenset[str]
    optional: frozenset[str]


def documented(signature: str) -> Callable:
    """What a text like "(self, x: 'Tensor', *, mask: 'Tensor | None' = None) -> 'Tensor'" promises."""
    plain = re.sub(r": <[^>]*>|: '[^']*'|-> .*$", "", signature)
    arguments = ast.parse(f"def function{plain}: pass").body[0].args  # type: ignore[attr-defined]
    positional = tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args))
    keywords = frozenset(argument.arg for argument in arguments.kwonlyargs)
    defaulted = [name for name, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default]
    trailing = positional[len(positional) - len(arguments.defaults) :]
    return Callable(positional, keywords, frozenset([*trailing, *(argument.arg for argument in defaulted)]))


def problems_of(name: str, function: Any, signature: str, idioms: set[str]) -> Iterator[str]:
    """Lines for what can't be called as it is documented."""
    promised, parameters = documented(signature), inspect.signature(function).parameters
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if tuple(names[: len(promised.positional)]) != promised.positional:
        yield f"{name}: takes {names}, must begin with {list(promised.positional)}"
    for missing in sorted((promised.keywords | set(promised.positional)) - set(parameters)):
        yield f"{name}: has no parameter {missing}"
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            if parameter.name in promised.optional:
                yield f"{name}: must have a default for {parameter.name}"
            if parameter.name not in {*promised.positional, *promised.keywords, *idioms}:
                yield f"{name}: asks for {parameter.name}, which is not documented"


def problems_of_class(name: str, kind: type, described: dict[str, Any], idioms: set[str]) -> Iterator[str]:
    """The same of a class, and its properties, which may be attributes."""
    for method, signature in described["methods"].items():
        if not callable(getattr(kind, method, None)):
            yield f"{name}: has no {method}"
        elif "*args" not in signature:
            yield from problems_of(f"{name}.{method}", getattr(kind, method), signature, idioms)
    for attribute in described.get("properties", ()):
        if not hasattr(kind, attribute) and f"self.{attribute}" not in inspect.getsource(kind.__init__):
            yield f"{name}: has no {attribute}"


@on_both
@pytest.mark.parametrize("path", API)
def test_every_documented_name_is_at_its_place(backend: Any, path: str) -> None:
    module, idioms, problems = backend.module(f"model.{path}"), IDIOMS[backend.name], []
    for name, described in API[path].items():
        found = getattr(module, name, None)
        if found is None:
            problems.append(f"{name}: missing")
        elif isinstance(described, str):
            problems += problems_of(name, found, described, idioms)
        else:
            problems += problems_of_class(name, found, described, idioms)
    assert not problems, f"{module.__name__}:\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda self, x, mask=None: None, None),
        (lambda self, x, mask=None, *, more=1: None, None),
        (lambda self, x, mask=None, *, rngs: None, None),
        (lambda self, y, mask=None: None, "has no parameter x"),
        (lambda self, mask=None, x=None: None, "must begin with"),
        (lambda self, x, mask: None, "must have a default for mask"),
        (lambda self, x, mask=None, *, more: None, "asks for more"),
        (lambda self, x: None, "has no parameter mask"),
    ],
)
def test_what_differs_from_the_documentation_is_seen(function: Any, problem: str | None) -> None:
    signature = "(self, x: 'Tensor', mask: 'Tensor | None' = None) -> 'Tensor'"
    found = "; ".join(problems_of("forward", function, signature, {"rngs"}))
    assert (problem in found) if problem else not found
