"""Named values inside plain functions: a tap gives back what it is given, and shows it to whoever records."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import TypeVar

Value = TypeVar("Value")
Visitor = Callable[[str, object], object]
_visitor: contextvars.ContextVar[Visitor | None] = contextvars.ContextVar("visitor", default=None)


def tap(name: str, value: Value) -> Value:
    """The value itself, which is recorded under ``name`` while something records; for NumPy and PyTorch.

    Args:
        name: dotted path, as "layers.0.attention".
        value: an array or tensor, or a container of them, whose parts get their keys added to the name.
    """
    visit = _visitor.get()
    return value if visit is None else visit(name, value)  # type: ignore[return-value]


@contextlib.contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """Let taps give ``visitor(name, value)`` while the context is open."""
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)
