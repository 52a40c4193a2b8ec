"""What layers do within a map over devices that hold parts of a model or of its sequences. Outside of such a map each
layer computes with what it is given. This file has no twin: torch puts other methods, and a cache, in their place.

Shapes: R rows of experts, D model dim, E experts, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from jaxtyping import Array, Float, Int, Shaped

from kempnerforge_jax.model.kv_cache import KVCache

_Apply = Callable[[Float[Array, "R D"], Int[Array, "E"]], Float[Array, "R D"]]
_Exchange = Callable[[_Apply, Float[Array, "R D"], Int[Array, "E"]], Float[Array, "R D"]]
_Whole = Callable[[Shaped[Array, "T ..."], int], Shaped[Array, "_ ..."]]
_exchange: ContextVar[_Exchange | None] = ContextVar("_exchange", default=None)
_others: ContextVar[KVCache | None] = ContextVar("_others", default=None)
_whole: ContextVar[_Whole | None] = ContextVar("_whole", default=None)


@contextlib.contextmanager
def exchanging(exchange: _Exchange) -> Iterator[None]:
    """Within it, layers hold a part of their experts, and ``exchange(apply, x_RD, ends_E)`` brings rows to theirs."""
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def apply_held(apply: _Apply, x_RD: Float[Array, "R D"], ends_E: Int[Array, "E"], held: int) -> Float[Array, "R D"]:
    """(R, D): rows through their experts by ``apply(x_RD, ends_E)``, which has ``held`` of them; rows of others are
    taken there as `exchanging` says.
    """
    exchange = _exchange.get()
    return apply(x_RD, ends_E) if exchange is None or held == len(ends_E) else exchange(apply, x_RD, ends_E)


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
