"""Check shapes and dtypes as functions are called: ``pytest -p tests.array_types FILES``.

The annotations of arrays in both backends (jaxtyping's ``Float[Tensor, "B S D"]``) are compared with what a call takes
and gives, the fields of a result included; letters mean the same number throughout a call. Other annotations are the
type checker's. An argument that the function itself refuses is its own to refuse: its error is what users see.
Nothing is compared in what torch compiles.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import jaxtyped

PACKAGES = ("kempnerforge_torch", "kempnerforge_jax")
ARRAY = re.compile(r"\b(Float|Int|Integer|Bool|Num|Shaped)\[")
ALIASES = re.compile(r"\b(Streams|Rope|State|Arrays|Tensors)\b")

compare = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float

annotated: set[str] = set()
"""Functions whose annotations speak of arrays."""

entered: set[str] = set()
"""Those of them that have been called."""


class ArrayArgumentError(AssertionError):
    """An argument is not as annotated, and the function took it."""


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose arguments and result are compared with the annotations that speak of arrays."""
    written = " ".join(map(str, function.__annotations__.values()))
    if not ARRAY.search(written) and not ALIASES.search(written):
        return function
    name = f"{function.__module__}.{function.__qualname__}"
    annotated.add(name)
    is_compiling = sys.modules["torch"].compiler.is_compiling if name.startswith("kempnerforge_torch") else bool

    made: list[Callable[..., Any]] = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        if not made:  # at the first call, when the module has defined what annotations name
            made.append(compare(_with_annotations(function, _hints(function))))
        with jaxtyped("context"):  # in which a letter means one number
            return made[0](*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return function(*args, **kwargs)
        entered.add(name)
        try:
            result = checked(*args, **kwargs)
        except BeartypeCallHintParamViolation as violation:
            function(*args, **kwargs)
            raise ArrayArgumentError(str(violation)) from violation
        _check_fields(result)
        return result

    call.__code__ = call.__code__.replace(co_name=function.__name__)  # torch counts what it compiles by code
    return functools.wraps(function)(call)


def _hints(owner: Any) -> dict[str, Any]:
    """The annotations that speak of arrays."""
    names = vars(sys.modules[owner.__module__])
    hints = {name: eval(getattr(hint, "__forward_arg__", hint), names) for name, hint in owner.__annotations__.items()}
    return {name: hint for name, hint in hints.items() if ARRAY.search(str(hint))}


_hints_of_class = functools.cache(_hints)


def _with_annotations(function: Any, hints: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of the function that has these annotations only."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    copy.__annotations__ = dict(hints)
    return copy


def _check_fields(result: Any) -> None:
    """The arrays of a dataclass or a named tuple of the backends have the shapes that its fields are declared with."""
    if type(result).__module__.partition(".")[0] in PACKAGES and hasattr(type(result), "__match_args__"):
        with jaxtyped("context"):
            for field, hint in _hints_of_class(type(result)).items():
                die_if_unbearable(getattr(result, field), hint)


class CheckingLoader(SourceFileLoader):
    """Loads a module with `check_arrays` as the innermost decorator of all its functions."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Compiled anew: the cache on the disk is that of the module as it stands."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list.append(ast.Name("__check_arrays__", ast.Load()))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        """With the decorator among its globals. Where JAX takes an array of its own it takes one of the host, and of a
        model without arrays their shapes.
        """
        if module.__name__.startswith("kempnerforge_jax"):
            jax = importlib.import_module("jax")
            vars(sys.modules["jaxtyping"])["Array"] = jax.Array | np.ndarray | jax.ShapeDtypeStruct
        vars(module)["__check_arrays__"] = check_arrays
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckingLoader(spec.loader.name, spec.loader.path)
        return spec


def pytest_configure() -> None:
    """Before any module of the backends is imported."""
    sys.meta_path.insert(0, _Finder())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many were entered, and which were not."""
    terminalreporter.write_line(f"annotated functions entered: {len(entered)} of {len(annotated)}")
    for name in sorted(annotated - entered):
        terminalreporter.write_line(f"not entered: {name}")
