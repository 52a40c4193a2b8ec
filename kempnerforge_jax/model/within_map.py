"""What layers do within a map over devices that hold parts of a model or of its sequences. Outside of such a map each
layer computes with what it is given. This file has no twin: torch puts other methods, and a cache, in their place.

Shapes: T tokens, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from jaxtyping import Array, Float, Shaped

from kempnerforge_jax.model.dispatch import Routes
from kempnerforge_jax.model.kv_cache import KVCache

_Routed = Callable[[Float[Array, "T D"], Routes], Float[Array, "T D"]]
_Gather = Callable[[_Routed, Float[Array, "T D"], Routes, int], Float[Array, "T D"]]
_Whole = Callable[[Shaped[Array, "T ..."], int], Shaped[Array, "_ ..."]]
_gather: ContextVar[_Gather | None] = ContextVar("_gather", default=None)
_others: ContextVar[KVCache | None] = ContextVar("_others", default=None)
_whole: ContextVar[_Whole | None] = ContextVar("_whole", default=None)


@contextlib.contextmanager
def gathering(gather: _Gather) -> Iterator[None]:
    """Within it, layers hold a part of their experts, and ``gather(routed, x_TD, routes, held)`` brings tokens to those
    that others hold.
    """
    token = _gather.set(gather)
    try:
        yield
    finally:
        _gather.reset(token)


def of_all(routed: _Routed, x_TD: Float[Array, "T D"], routes: Routes, held: int) -> Float[Array, "T D"]:
    """(T, D): what experts make of tokens, where ``routed(x_TD, routes)`` is what ``held`` of them do; tokens are
    brought to others as `gathering` says.
    """
    gather = _gather.get()
    if gather is None or held == len(routes.plan.ends_E):
        return routed(x_TD, routes)
    return gather(routed, x_TD, routes, held)


@contextlib.contextmanager
def reading(others: KVCache) -> Iterator[None]:
    """Within it, attention that is given no cache reads what ``others.update`` gives for its keys and values; positions
    and masks of a forward are those of ``others``.
    """
    token = _others.set(others)
    try:
        yield
    finally:
        _others.reset(token)


def read_besides() -> KVCache | None:
    """What attention without a cache is `reading`."""
    return _others.get()


@contextlib.contextmanager
def measuring(whole: _Whole) -> Iterator[None]:
    """Within it, losses and counts of routers are of the tokens that ``whole(array (T, ...), batch_size)`` gives for
    their own.
    """
    token = _whole.set(whole)
    try:
        yield
    finally:
        _whole.reset(token)


def measured(tokens: Shaped[Array, "T ..."], batch_size: int) -> Shaped[Array, "_ ..."]:
    """What routers measure of their tokens: these, or those that they are `measuring`."""
    whole = _whole.get()
    return tokens if whole is None else whole(tokens, batch_size)
