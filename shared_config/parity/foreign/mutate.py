"""Small bugs planted by machine in a component, one at a time: the share of them that its test finds."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType

from shared_config.errors import UserError
from shared_config.parity.operators import Mutation, mutations_of

LONGEST = 10.0
"""A test that takes this many times as long as without a bug has found it."""
SHORTEST = 2.0
"""Seconds that a test is given at least."""

Component = FunctionType | type | ModuleType


@dataclass(frozen=True)
class Survivor:
    """A bug that the test did not find.

    Attributes:
        before, after: the line concerned.
    """

    function: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.function}: {self.before}  ->  {self.after}"


@dataclass(frozen=True)
class Score:
    """What a test found of the bugs that were planted.

    Attributes:
        planted: how many.
        killed: of them, those that made the test fail, by name of the exception ("hang" if it did not end in time).
        survivors: the others.
    """

    planted: int
    killed: Counter[str]
    survivors: tuple[Survivor, ...]

    @property
    def share(self) -> float:
        """Of the planted bugs, how many were found: 1 is all."""
        return self.killed.total() / self.planted if self.planted else 1.0


class HangError(BaseException):
    """A test that does not end; no exception of its own kind that a test may catch."""


def mutate(
    component: Component, test: Callable[[], object], *, sample: int | None = 60, seed: int = 0, only: str = ""
) -> Score:
    """Plant bugs in the source of a component, and see which of them a test finds.

    Comparisons, arithmetic, constants, dtypes, arguments, conditions, calls and updates are changed, in place, while
    the test runs. What has been compiled from the component before is compiled anew: caches of JAX are cleared.

    Args:
        component: a function, a class, or a module, whose functions and methods get the bugs.
        test: fails, with any exception, where it finds a bug; it must pass without one.
        sample: number of bugs, drawn at random; None for all that can be planted.
        seed: of the draw.
        only: part of the qualified names of functions that get bugs.

    Raises:
        UserError: the test fails without a bug, or nothing can be planted.
    """
    file, functions = _source_of(component), _functions_of(component)
    functions = {name: function for name, function in functions.items() if only in name}
    source = file.read_bytes()
    every = [bug for bug in mutations_of(str(file), source) if bug.function in functions and _changes(bug, source)]
    if not every:
        raise UserError(f"component = {component!r}: has no source in which a bug could be planted")
    drawn = every if sample is None or sample >= len(every) else random.Random(seed).sample(every, sample)
    start = time.monotonic()
    try:
        test()
    except Exception as error:
        raise UserError(f"the test fails without a bug: {type(error).__name__}: {error}") from error
    limit = max(SHORTEST, LONGEST * (time.monotonic() - start))
    killed: Counter[str] = Counter()
    survivors = []
    for bug in drawn:
        found = _outcome(bug, source, functions[bug.function], test, limit)
        if found:
            killed[found] += 1
        else:
            survivors.append(Survivor(bug.function, bug.before, bug.after))
    return Score(len(drawn), killed, tuple(survivors))


def _changes(bug: Mutation, source: bytes) -> bool:
    """Whether a bug changes what a function does, and not the defaults of its arguments alone."""
    return bug.is_change(source) and _code_of(bug, source) != _code_of(
        dataclasses.replace(bug, start=0, end=0, replacement=""), source
    )


def _outcome(bug: Mutation, source: bytes, function: FunctionType, test: Callable[[], object], limit: float) -> str:
    """What a test raised while a function had a bug; "" if nothing."""
    own, code = function.__code__, _code_of(bug, source)
    if code is None or code.co_freevars != own.co_freevars:
        return "SyntaxError"
    _forget_programs(function)
    function.__code__ = code
    try:
        with _ending_after(limit):
            test()
    except HangError:
        return "hang"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what pytest raises itself is not an Exception
        return type(error).__name__
    finally:
        function.__code__ = own
        _forget_programs(function)
    return ""


def _source_of(component: Component) -> Path:
    try:
        file = inspect.getsourcefile(inspect.unwrap(component) if callable(component) else component)
    except TypeError:
        file = None
    if file is None or not Path(file).exists():
        raise UserError(f"component = {component!r}: must be a function, class or module of Python with its source")
    return Path(file)


def _functions_of(component: Component) -> dict[str, FunctionType]:
    """Functions of a component by qualified name."""
    if isinstance(component, ModuleType):
        members = [
            value for value in vars(component).values() if getattr(value, "__module__", "") == component.__name__
        ]
        found = [_functions_of(value) for value in members if isinstance(value, type | FunctionType)]
        return {name: function for each in found for name, function in each.items()}
    if isinstance(component, type):
        plain = (getattr(value, "__func__", getattr(value, "fget", value)) for value in vars(component).values())
        return {value.__qualname__: value for value in plain if isinstance(value, FunctionType)}
    own = inspect.unwrap(component)
    return {own.__qualname__: own} if isinstance(own, FunctionType) else {}


def _code_of(bug: Mutation, source: bytes) -> CodeType | None:
    """The code of the function that a bug is in, from the whole file with the bug."""
    return next((code for code in _codes(compile(bug.apply(source), bug.file, "exec")) if _is_of(code, bug)), None)


def _is_of(code: CodeType, bug: Mutation) -> bool:
    return code.co_qualname == bug.function


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _forget_programs(function: FunctionType) -> None:
    """Let JAX, if the file of a function uses it, compile anew."""
    modules = (
        getattr(value, "__name__", "") for value in function.__globals__.values() if isinstance(value, ModuleType)
    )
    if "jax" in sys.modules and any(name.split(".")[0] in ("jax", "flax", "equinox", "haiku") for name in modules):
        sys.modules["jax"].clear_caches()


@contextlib.contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """Raise `HangError` after some seconds, in the main thread of systems that have timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
