"""The mesh of devices that a layout names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh as DeviceMesh

from kempnerforge_jax.device import find_device, process_count
from kempnerforge_jax.distributed.devices import Device
from shared_config.contract.sharding import MESH_AXES, Layout, layout_of, refusals, unsupported
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.vision import tower_of
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
    if problems := [*refusals(config), *unsupported(config, "jax", tower_of(config), devices[0].platform)]:
        raise ConfigError(problems)
    if problems := list(_torn_ranks(layout, devices)):
        raise ConfigError(problems)
    sizes = tuple(getattr(layout, axis) for axis in MESH_AXES)
    return Mesh(layout, DeviceMesh(np.asarray(devices).reshape(sizes), MESH_AXES))


def devices_of(device: Device | str | None) -> list[Device]:
    """The devices of a run, those of each process in a row: all that there are for None, or the one of a name. Several
    processes have all of the platform that it names.

    Raises:
        UserError: this machine has no such device, or it is that of one process.
    """
    found = find_device(device)
    if process_count() > 1:
        if isinstance(device, str) and ":" in device:
            raise UserError(f"device = {device!r}: must be a platform, as cpu; processes train together on all devices")
        return sorted(jax.devices(found.platform), key=lambda each: each.process_index)
    return jax.devices(found.platform) if device is None else [found]


def own_devices(devices: Sequence[Device]) -> list[Device]:
    """Those of the devices that this process has."""
    return [device for device in devices if device.process_index == jax.process_index()]


def drawing_device(mesh: Mesh | None, device: Device) -> Device:
    """Where initial values are made: on a mesh by the host, where JAX may use it, as one device may not hold them."""
    if mesh is None:
        return device
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return device


def _torn_ranks(layout: Layout, devices: Sequence[Device]) -> Iterator[str]:
    """Why the devices of a data rank, which share their micro-batches, can't be those of a process, or of several."""
    of_rank = layout.devices // layout.data_ranks
    of_process = len(devices) // len({device.process_index for device in devices})
    if of_rank % of_process and of_process % of_rank:
        yield (
            f"distributed.cp = {layout.cp}, distributed.tp = {layout.tp}: their product must divide the {of_process} "
            "devices of a process, or be a multiple of them"
        )
