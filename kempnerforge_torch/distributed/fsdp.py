"""Fully sharded data parallelism: each rank holds a part of every tensor, and gathers a block while it computes."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.model.moe import MoEMLP
from kempnerforge_torch.model.state import own_tensors
from shared_config.contract.sharding import fsdp_axes, placement
from shared_config.contract.specs import ParameterTable
from shared_config.errors import ConfigError


def shard_parameters(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    table: ParameterTable,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """Split the parameters over the ranks that see different tokens: gathered block by block to compute with, their
    gradients summed (not averaged) over all these ranks.

    Tensors are split along the axis that `placement` says, those for which it has none unevenly along the first, unless
    "tp" splits them or the table wants them in full precision: these stay as they are, and their gradients are this
    rank's alone. So do experts' that no other rank holds: layers cast them.

    Args:
        blocks: what is gathered together, with their experts; the rest is gathered with the model.
        compute_dtype: of the arithmetic.
        dtype: of the parameters, once they have values, and of the sums of gradients.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # nobody writes to them
    own = own_tensors(model)
    places = {id(tensor): fsdp_place(name, mesh, table) for name, tensor in own.items()}
    ignored = {tensor for tensor in own.values() if places[id(tensor)] is None}
    spread = {
        layer: block
        for block in blocks
        for layer in block.modules()
        if isinstance(layer, MoEMLP) and mesh.layout.ep > 1
    }
    if mesh.experts.size() == 1:
        ignored |= {tensor for layer in spread for tensor in layer.parameters(recurse=False)}
        spread = {}
    devices = mesh.copies_and_parts
    policy = MixedPrecisionPolicy(compute_dtype, dtype, cast_forward_inputs=False)
    unit = functools.partial(_unit, places=places, devices=devices, policy=policy, ignored=ignored)
    for layer, block in spread.items():
        for part in layer.children():
            with _called_with(part, block):
                unit(part)
        with _called_with(layer, block):
            unit(layer, devices=mesh.experts)
    for module in (*blocks, model):
        unit(module)


def release(model: nn.Module) -> None:
    """Keep only the parts of what a forward without a backward pass left gathered. The next forward gathers it anew,
    with the values of its time and with what is frozen then.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def ruled_axes(name: str, mesh: Mesh, table: ParameterTable) -> dict[str, int]:
    """Axis of the mesh -> axis of the tensor that it splits, for "ep" and "tp"."""
    if name not in table:
        return {}
    spec = table[name]
    splits = placement(spec, mesh.layout, gathered=True).splits
    return {axes[0]: place for place, axes in enumerate(splits) if axes}


def fsdp_place(name: str, mesh: Mesh, table: ParameterTable) -> int | None:
    """The axis of a tensor that FSDP is to split; None for what it must leave alone. What nothing splits may be split
    unevenly, but along the first axis alone, and not where "tp" or "ep" does.

    Raises:
        ConfigError: experts' tensors that no axis of can be split.
    """
    if name in table and table[name].full_precision:
        return None
    axis, ruled = _axis(name, mesh, table), ruled_axes(name, mesh, table)
    if axis is not None or not ruled:
        return axis or 0
    free = [place for place in range(len(table[name].shape)) if place not in ruled.values()]
    ranks = mesh.layout.size(*fsdp_axes(table[name]))
    if "ep" in ruled and ranks > 1:
        held = f"{ranks} ranks hold the same experts"
        raise ConfigError(
            [f"distributed.ep = {mesh.layout.ep}: {held}, which must divide an axis of {name} {table[name].shape}"]
        )
    return free[0] if free and ranks == 1 else None


def _axis(name: str, mesh: Mesh, table: ParameterTable) -> int | None:
    """The axis of a tensor that is split over the data ranks; None where the table leaves it whole."""
    if name not in table:
        return None
    ruled = ruled_axes(name, mesh, table).values()
    splits = placement(table[name], mesh.layout).splits
    return next((place for place, axes in enumerate(splits) if axes and place not in ruled), None)


@contextlib.contextmanager
def _called_with(part: Any, block: nn.Module) -> Iterator[None]:
    """Within it, hooks for calls of a part of a block are for calls of the block: a compiled block has none inside."""
    part.register_forward_pre_hook = block.register_forward_pre_hook
    part.register_forward_hook = block.register_forward_hook
    try:
        yield
    finally:
        del part.register_forward_pre_hook, part.register_forward_hook


def _unit(
    module: nn.Module,
    places: dict[int, int | None],
    devices: DeviceMesh,
    policy: MixedPrecisionPolicy,
    ignored: set[Any],
) -> None:
    unit = fully_shard(
        module,
        mesh=devices,
        mp_policy=policy,
        shard_placement_fn=lambda tensor: Shard(places[id(tensor)] or 0),
        ignored_params=ignored,
    )
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
