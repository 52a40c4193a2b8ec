"""The mesh of devices that a layout names, and the groups of ranks in it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kempnerforge_torch.device import process_count
from shared_config.contract.sharding import (
    DATA_AXES,
    MESH_AXES,
    TOKEN_AXES,
    Layout,
    layout_of,
    refusals,
    unsupported,
)
from shared_config.errors import ConfigError
from shared_config.interchange.vision import tower_of
from shared_config.schema.job import JobConfig


@dataclass(frozen=True)
class Mesh:
    """The devices of all processes, by the axes of `Layout`.

    Attributes:
        axes: the mesh with the axes that are larger than 1, and "dp_shard": each opens a group of processes.
        data: this rank's row of ranks that see different micro-batches.
        tokens: this rank's row of ranks that see different tokens, of one micro-batch or of several.
        copies_and_parts: this rank's row of ranks among which a tensor outside the experts is split; where the model
            has copies, with a first axis over these.
        experts: the same for experts' tensors, which "ep" splits.
    """

    layout: Layout
    axes: DeviceMesh
    data: DeviceMesh
    tokens: DeviceMesh
    copies_and_parts: DeviceMesh
    experts: DeviceMesh

    @property
    def data_rank(self) -> int:
        """The place of this rank's micro-batches among those of all."""
        return self.data.get_local_rank()

    @property
    def rank_of_stage(self) -> int:
        """The place of this rank among those of its pipeline stage: "pp" is the outermost axis."""
        return dist.get_rank() % (self.layout.devices // self.layout.pp)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks along an axis that is larger than 1, this one among them."""
        return self.axes[axis].get_group()


def open_mesh(config: JobConfig, device: torch.device) -> Mesh | None:
    """The mesh of a job; None for one process.

    Raises:
        ConfigError: a layout that does not fit the processes or the model, with each reason.
    """
    processes = process_count()
    layout = layout_of(config.distributed, processes)
    if processes == 1:
        return None
    if problems := [*refusals(config), *unsupported(config, "torch", tower_of(config))]:
        raise ConfigError(problems)
    names = tuple(axis for axis in MESH_AXES if layout.size(axis) > 1 or axis == "dp_shard")
    axes = init_device_mesh(device.type, tuple(layout.size(axis) for axis in names), mesh_dim_names=names)
    row = functools.partial(_row, layout, axes)
    fsdp, experts = row(("dp_shard", "ep", "cp")), row(("dp_shard", "cp"))
    return Mesh(layout, axes, row(DATA_AXES), row(TOKEN_AXES), _with_copies(axes, fsdp), _with_copies(axes, experts))


def _row(layout: Layout, axes: DeviceMesh, names: Sequence[str]) -> DeviceMesh:
    """One axis over several; those of size 1 make no difference."""
    larger = tuple(name for name in names if layout.size(name) > 1)
    return axes[larger or ("dp_shard",)]._flatten()


def _with_copies(axes: DeviceMesh, parts: DeviceMesh) -> DeviceMesh:
    """The mesh of parts; where the model has copies, with a first axis over these."""
    assert axes.mesh_dim_names is not None
    assert parts.mesh_dim_names is not None
    if "dp_replicate" not in axes.mesh_dim_names:
        return parts
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Slicing a flattened dim")  # torch 2.11, of its later self
        return axes["dp_replicate", parts.mesh_dim_names[0]]
