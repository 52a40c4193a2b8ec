"""Base of every module of this backend: an NNX module with ``forward``, whose calls can be observed.

Torch's `nn.Module` has these abilities built in; here they are: named walks, observers of outputs, a change of dtype,
and values of the last call kept beside the module (an NNX module holds parameters and buffers only, so that it can
cross jit).
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

Observer = Callable[["Module", object], None]
Substitute = Callable[["Module", object], object]
_observers: contextvars.ContextVar[tuple[Observer, ...]] = contextvars.ContextVar("observers", default=())
_substitutes: contextvars.ContextVar[tuple[Substitute, ...]] = contextvars.ContextVar("substitutes", default=())
_kept: weakref.WeakKeyDictionary[Module, dict[str, Any]] = weakref.WeakKeyDictionary()


class Buffer(nnx.Variable[jax.Array]):
    """An array that is saved with the parameters, never gets a gradient, and stays in at least float32."""


class Table(nnx.Variable[jax.Array]):
    """An array that follows from the config: neither saved nor cast with the model."""

    saved = False


class Module(nnx.Module):
    """Base of all modules: subclasses define ``forward``."""

    deterministic = False
    """Whether `eval` was called last, rather than `train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        for observe in _observers.get():
            observe(self, output)
        for substitute in _substitutes.get():
            output = substitute(self, output)
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module computes."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def to(self, dtype: DTypeLike) -> Self:
        """Cast all floating-point parameters, in place, and all buffers, these to at least float32."""
        for _, variable in named_variables(self):
            value = variable.get_value()
            if isinstance(variable, Table) or not jnp.issubdtype(value.dtype, jnp.floating):
                continue
            own = jnp.promote_types(dtype, jnp.float32) if isinstance(variable, Buffer) else dtype
            variable.set_value(_cast(value, own))
        return self

    @property
    def _nnx_tabulate_id(self) -> int:
        raise AttributeError

    @_nnx_tabulate_id.setter
    def _nnx_tabulate_id(self, _: int) -> None:
        raise TypeError(
            "nnx.tabulate: compiles every method by itself, and those here take more than arrays; nnx.display(model) "
            "shows the parameters, `kempnerforge show CONFIG` their sizes, kempnerforge_jax.parity.record activations"
        )

    def keep(self, **values: object) -> None:
        """Remember values of this call for `kept`. Inside a trace there is nothing to remember, and nothing happens."""
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
            _kept.setdefault(self, {}).update(values)

    def kept(self, name: str, default: object = None) -> Any:
        """A value that the last call outside jit remembered."""
        return _kept.get(self, {}).get(name, default)


class Numbered(nnx.Dict[Any]):
    """Modules under the numbers "0", "1", ... or ranges of them, always in the order of the numbers. ``modules[0]`` is
    ``modules["0"]``.

    A model that was taken apart and merged has its attributes in the order of their names as text, "10" before "2".
    """

    def __iter__(self) -> Iterator[str]:
        numbered = (name for name in super().__iter__() if name[0].isdigit())  # tools leave names of their own
        return iter(sorted(numbered, key=lambda name: int(re.split(r"\D", name)[0])))

    def __getitem__(self, key: str | int) -> Any:
        return super().__getitem__(str(key))


@contextlib.contextmanager
def observing(observe: Observer) -> Iterator[None]:
    """Call ``observe(module, output)`` after each module's call, also inside a trace."""
    start_observing(observe)
    try:
        yield
    finally:
        stop_observing(observe)


def start_observing(observe: Observer) -> None:
    """Call ``observe(module, output)`` after each module's call from now on."""
    _observers.set((*_observers.get(), observe))


def stop_observing(observe: Observer) -> None:
    """The opposite of `start_observing`."""
    _observers.set(tuple(other for other in _observers.get() if other != observe))


@contextlib.contextmanager
def substituting(substitute: Substitute) -> Iterator[None]:
    """Let each module's call give ``substitute(module, output)``, also inside a trace. Observers see the output."""
    token = _substitutes.set((*_substitutes.get(), substitute))
    try:
        yield
    finally:
        _substitutes.reset(token)


def is_observed() -> bool:
    """Whether outputs are being observed or replaced; then no scan and no rematerialisation may hide layers."""
    return bool(_observers.get() or _substitutes.get())


def named_modules(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Every module by its dotted path, the root ("") first, in order of definition."""
    yield prefix, module
    for name, child in _members(module):
        if isinstance(child, nnx.Module):
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def named_variables(module: nnx.Module) -> Iterator[tuple[str, nnx.Variable[jax.Array]]]:
    """Every parameter, buffer and table by its dotted path, in order of definition."""
    for path, owner in named_modules(module):
        for name, variable in _members(owner):
            if isinstance(variable, nnx.Variable):
                yield f"{path}.{name}" if path else name, variable


def _members(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(module, Numbered):
        return iter(module.items())
    return ((name, value) for name, value in vars(module).items() if not name.startswith("_pytree__"))


def _cast(value: Any, dtype: Any) -> Any:
    """The value in another dtype; an abstract one stays abstract."""
    return jax.ShapeDtypeStruct(value.shape, dtype) if isinstance(value, jax.ShapeDtypeStruct) else value.astype(dtype)
