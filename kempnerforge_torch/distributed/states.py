"""Tensors that lie on many ranks: brought to the host of the first, or each rank's own parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.processes import is_main
from kempnerforge_torch.distributed.ranks import box_of, local, splits
from kempnerforge_torch.model.state import to_numpy
from shared_config.contract.sharding import stage_of
from shared_config.interchange.parts import Part, Parts
from shared_config.interchange.states import numpy_dtype, whole

AnyValue = TypeVar("AnyValue")


def host_copies(tensors: Mapping[str, Shaped[Tensor, "..."]], mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Copies of all tensors, of all stages, on the first rank, {} on others; the ranks that hold parts of one put it
    together.
    """
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if mesh is None or mesh.rank_of_stage == 0:
            found[name] = to_numpy(gathered.to("cpu", copy=True))
    every = of_all_stages(found, mesh)
    return every if is_main() else {}


def of_all_stages(own: Mapping[str, AnyValue], mesh: Mesh | None) -> dict[str, AnyValue]:
    """What the ranks along "pp" have, each of the tensors of its stage, on all of them."""
    if mesh is None or mesh.layout.pp == 1:
        return dict(own)
    every: list[Mapping[str, AnyValue]] = [own] * mesh.layout.pp
    dist.all_gather_object(every, own, group=mesh.group("pp"))
    return {name: value for one in every for name, value in one.items()}


def of_own_stage(every: Mapping[str, AnyValue], n_layers: int, mesh: Mesh | None) -> dict[str, AnyValue]:
    """Of tensors, or moments of them, those that this rank's stage holds."""
    if mesh is None or mesh.layout.pp == 1:
        return dict(every)
    stages, stage = mesh.layout.pp, mesh.group("pp").rank()
    return {name: value for name, value in every.items() if stage_of(name, n_layers, stages) == stage}


def own_parts(tensors: Mapping[str, Shaped[Tensor, "..."]], mesh: Mesh | None) -> dict[str, Parts]:
    """Copies, on the host, of what this rank is to write of each tensor: the part that it holds, unless a rank before
    it holds the same.
    """
    return {name: _own_part(tensor.detach(), mesh) for name, tensor in tensors.items()}


def _own_part(tensor: Tensor, mesh: Mesh | None) -> Parts:
    shape, dtype = tuple(tensor.shape), numpy_dtype(tensor.dtype)
    part, start = local(tensor), tuple(side.start for side in box_of(tensor))
    is_there = part.numel() > 0 or tensor.numel() == 0
    if not is_there or (mesh is not None and not _is_first(tensor, mesh)):
        return Parts(shape, dtype)
    return Parts(shape, dtype, (Part(start, to_numpy(part.to("cpu", copy=True))),))


def _is_first(tensor: Tensor, mesh: Mesh) -> bool:
    """Whether no rank before this one holds the same part: along each axis that does not split the tensor it is the
    first. (Stages hold different tensors.)
    """
    rows = [set(ranks) for _, ranks, _ in splits(tensor)]
    return all(
        mesh.axes.get_local_rank(axis) == 0
        or any(row.issuperset(dist.get_process_group_ranks(mesh.group(axis))) for row in rows)
        for axis in mesh.axes.mesh_dim_names or ()
        if axis != "pp"
    )
