"""What a recording sees of a JAX function, and what goes on in the place of what it sees."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Shaped

from kempnerforge_jax.program import passing
from shared_config.parity.foreign.containers import map_tensors
from shared_config.parity.foreign.options import Options, check_fed, fed_back, fed_to

Value = TypeVar("Value")


def tap(name: str, value: Value) -> Value:
    """The value itself, which is recorded under ``name``; works inside jit, scans and rematerialisation.

    Args:
        name: dotted path, as "layers.0.attention".
        value: an array, or a container of them, whose parts get their keys added to the name.
    """
    return map_tensors(lambda leaf, array: named(array, leaf), value, name, is_array)


def named(array: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """The array under a name; within vmap its new axes come first, wherever the operations before it left them."""
    return checkpoint_name(jax.lax.reshape(jax.lax.reshape(array, (1, *array.shape)), array.shape), name)


class Taps:
    """What is recorded, in the order of execution, and what goes on in its place.

    Attributes:
        names, values: of what is recorded.
        places: of those that have a gradient.
        others: names of what is not asked for.
        ends: values that others went on in place of, whose gradients are given.
        given: those gradients.
    """

    def __init__(
        self,
        options: Options,
        fed: dict[str, Shaped[Array, "..."]],
        key: tuple[Shaped[Array, "..."], Shaped[Array, "..."]] | None,
        shifts: list[Shaped[Array, "..."]] | None,
    ):
        self.names: list[str] = []
        self.values: list[Array] = []
        self.places: list[int] = []
        self.others: list[str] = []
        self.ends: list[Array] = []
        self.given: list[Array] = []
        self._options, self._fed, self._key, self._shifts = options, fed, key, shifts
        self._calls: dict[str, int] = {}
        self._results = 0

    def visit(self, name: str, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Record an array, and give what goes on. Complex numbers are recorded as pairs of real ones, along a last
        axis.
        """
        if jnp.iscomplexobj(array):
            pairs = self.visit(name, jnp.stack([array.real, array.imag], axis=-1))
            return jax.lax.complex(pairs[..., 0], pairs[..., 1])
        call = self._calls[name] = self._calls.get(name, -1) + 1
        own, fed = array, fed_to(self._fed, name, call)
        if fed is not None:
            check_fed(name, fed.shape, array.shape)
            array = self._replaced(array, fed.astype(array.dtype), fed_back(self._fed, name, call))
        if self._options.wants(name):
            if is_floating(array):
                self.places.append(len(self.names))
                array = array if self._shifts is None else array + self._shifts[len(self.places) - 1]
            self.names.append(name)
            self.values.append(own)
        else:
            self.others.append(name)
        return self._moved(array, sum(self._calls.values()) + len(self._calls)) if is_floating(array) else array

    def rounded(self, result: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """A result that is not recorded, as rounding may leave it."""
        assert self._key is not None
        self._results += 1
        return self._moved(result, 2**32 - self._results)

    def _moved(self, array: Array, place: int) -> Array:
        if self._key is None:
            return array
        key = jax.random.fold_in(self._key[0], place)
        return array * (1 + self._key[1] * jax.random.uniform(key, array.shape, array.dtype, -1, 1))

    def _replaced(self, array: Array, fed: Array, gradient: Array | None) -> Array:
        """What goes on in place of an array; gradients beyond come from that of the other side, if it is known."""
        if not is_floating(array):
            return fed
        if gradient is None:
            return passing(array, fed)
        self.ends.append(array)
        self.given.append(gradient.astype(array.dtype))
        return fed


def is_floating(value: Shaped[Array, "..."] | np.ndarray) -> bool:
    """Whether an array is of real numbers."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def is_inexact(value: Shaped[Array, "..."] | np.ndarray) -> bool:
    """Whether an array is of real or complex numbers."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def is_array(value: object) -> TypeGuard[Shaped[Array, "..."] | np.ndarray]:
    """Whether a value is an array."""
    return isinstance(value, Array | np.ndarray)
