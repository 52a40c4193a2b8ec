"""The attributes of a device of JAX."""

from __future__ import annotations

from typing import Protocol


class Device(Protocol):
    """A `jax.Device`, of which type checkers know nothing."""

    @property
    def platform(self) -> str:
        """As "cpu" or "gpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The model of an accelerator, or "cpu"."""
        ...

    @property
    def process_index(self) -> int:
        """The number of the process that it belongs to."""
        ...
