"""Tensors that lie on many ranks: brought to the host of the first, or each rank's own parts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.processes import is_main
from kempnerforge_torch.distributed.ranks import box_of, local, splits
from kempnerforge_torch.model.state import to_numpy
from shared_config.interchange.parts import Part, Parts
from shared_config.interchange.states import numpy_dtype, whole


def host_copies(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, np.ndarray]:
    """Copies of all tensors on the first rank, {} on others; the ranks that hold parts of one put it together."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if is_main():
            found[name] = to_numpy(gathered.to("cpu", copy=True))
    return found


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
