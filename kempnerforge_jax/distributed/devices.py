"""The attributes of a device of JAX."""

from __future__ import annotations

from collections.abc import Mapping
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
    def local_hardware_id(self) -> int:
        """Its number among those of its machine, or of its process."""
        ...

    @property
    def process_index(self) -> int:
        """The number of the process that it belongs to."""
        ...

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes in use and at the peak, of an accelerator whose runtime tells."""
        ...
