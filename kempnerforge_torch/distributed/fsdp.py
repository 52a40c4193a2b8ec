"""Fully sharded data parallelism: each rank holds a part of every tensor, and has a block's whole while it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.model.state import own_tensors
from kempnerforge_torch.model.wrappers import plain_modules
from shared_config.contract.sharding import placement
from shared_config.contract.specs import ParameterTable


def shard_parameters(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    table: ParameterTable,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """Split the parameters over the data ranks: gathered block by block to compute with, their gradients summed (not
    averaged) over all data ranks.

    Tensors are split along the axis that `placement` says, those for which it has none unevenly along the first. What
    the table wants in full precision is a unit of its own, so that it isn't cast.

    Args:
        blocks: what is gathered at a time; the rest is gathered with the model.
        compute_dtype: of the arithmetic.
        dtype: of the parameters, once they have values, and of the sums of gradients.
    """
    places = {id(tensor): _axis(name, mesh, table) for name, tensor in own_tensors(model).items()}
    policy = MixedPrecisionPolicy(compute_dtype, dtype, cast_forward_inputs=False)
    for path, module in plain_modules(model).items():
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        if names and any(name in table and table[name].full_precision for name in names):
            _unit(module, mesh, places, MixedPrecisionPolicy(cast_forward_inputs=False))
    for module in (*blocks, model):
        _unit(module, mesh, places, policy)


def _unit(module: nn.Module, mesh: Mesh, places: dict[int, int], policy: MixedPrecisionPolicy) -> None:
    devices = mesh.fsdp if mesh.layout.dp_replicate == 1 else mesh.axes["dp_replicate", "dp_shard"]
    unit = fully_shard(
        module, mesh=devices, mp_policy=policy, shard_placement_fn=lambda tensor: Shard(places[id(tensor)])
    )
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def _axis(name: str, mesh: Mesh, table: ParameterTable) -> int:
    """The axis of a tensor that is split over the data ranks; 0 where the table leaves it whole."""
    if name not in table:
        return 0
    splits = placement(table[name], mesh.layout).splits
    return next((place for place, axes in enumerate(splits) if "dp_shard" in axes or axes == ("ep",)), 0)
