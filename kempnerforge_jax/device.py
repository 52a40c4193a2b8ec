"""Where training runs."""

from __future__ import annotations

import jax

from kempnerforge_jax.distributed.devices import Device
from shared_config.errors import UserError
from shared_config.training.speed import resident_peak


def find_device(name: Device | str | None) -> Device:
    """The `jax.Device` of a name, as "cpu" or "cuda:1"; a device is its own, None is JAX's default.

    Raises:
        UserError: this machine has no such device.
    """
    if name is not None and not isinstance(name, str):
        return name
    platform, colon, index = ("", "", "0") if name is None else name.partition(":")
    try:
        default = jax.devices()
        devices = default if name is None else jax.devices(platform)
        known = name is None or (platform and (not colon or (index.isdecimal() and int(index[:9]) < len(devices))))
    except RuntimeError as error:
        raise UserError(f"device = {name!r}: JAX finds no such device: {str(error).splitlines()[0]}") from None
    if not known:
        allowed = ", ".join(sorted({device.platform for device in default} | {"cpu"}))
        raise UserError(f"device = {name!r}: must be one of {allowed}, or one with its index, as cpu:0")
    return devices[int(index) if colon else 0]


def device_kind(device: Device) -> str:
    """The model of an accelerator as its driver calls it, or "cpu"."""
    return device.device_kind


def peak_memory(device: Device) -> int | None:
    """The most bytes that arrays of this process have held on a device at once; of a CPU, what the process has. None
    where that is not known.
    """
    if device.platform == "cpu":
        return resident_peak()
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def process_count() -> int:
    """How many processes the framework has joined to work together; 1 without."""
    return jax.process_count()
