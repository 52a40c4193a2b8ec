"""The mesh of devices that a layout names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from kempnerforge_jax.device import find_device
from kempnerforge_jax.distributed.devices import Device
from shared_config.contract.sharding import MESH_AXES, Layout, layout_of, refusals, unsupported
from shared_config.errors import ConfigError
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Mesh:
    """Devices by the axes of `Layout`, of all processes.

    Attributes:
        axes: the mesh with every axis.
    """

    layout: Layout
    axes: DeviceMesh


def open_mesh(config: JobConfig, devices: Sequence[Device]) -> Mesh | None:
    """The mesh of a job; None for one device.

    Raises:
        ConfigError: a layout that does not fit the devices or the model, with each reason.
    """
    layout = layout_of(config.distributed, len(devices))
    if len(devices) == 1:
        return None
    if problems := [*refusals(config), *unsupported(config, "jax", devices[0].platform)]:
        raise ConfigError(problems)
    sizes = tuple(getattr(layout, axis) for axis in MESH_AXES)
    return Mesh(layout, DeviceMesh(np.asarray(devices).reshape(sizes), MESH_AXES))


def devices_of(device: Device | str | None) -> list[Device]:
    """The devices of a run: all that there are for None, or the one of a name.

    Raises:
        UserError: this machine has no such device.
    """
    found = find_device(device)
    return jax.devices(found.platform) if device is None else [found]


def drawing_device(mesh: Mesh | None, device: Device) -> Device:
    """Where initial values are made: on a mesh by the host, where JAX may use it, as one device may not hold them."""
    if mesh is None:
        return device
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return device
