"""What a step needs from the other ranks: sums over all that see different micro-batches, and the norm of a gradient
whose parts lie on many ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard
from torch.utils._pytree import tree_flatten, tree_unflatten

from kempnerforge_torch.distributed.collectives import add_up
from kempnerforge_torch.distributed.mesh import Mesh
from shared_config.interchange.parts import Box

Tree = TypeVar("Tree")
READ = 1 << 15
"""Values whose squares torch may add up on a CPU, where it does so one after another in their own dtype."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that see different micro-batches; without a mesh there is one."""

    mesh: Mesh | None

    @property
    def rank(self) -> int:
        """The number of this one."""
        return 0 if self.mesh is None else self.mesh.data_rank

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.data.size()

    def number(self, number: int) -> int:
        """The sum of a number of the host."""
        return int(self.sums(torch.tensor(number, device="cpu")))

    def sums(self, tree: Tree) -> Tree:
        """The sum of each tensor of a tree; the same bits on every rank. Those of one dtype, on one device, are sent
        together.
        """
        if self.mesh is None:
            return tree
        leaves, structure = tree_flatten(tree)
        found = [torch.as_tensor(leaf).clone() for leaf in leaves]
        for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in found):
            alike = [tensor for tensor in found if (tensor.dtype, tensor.device) == kind]
            add_up(alike, self.mesh.data.get_group())
        return tree_unflatten(found, structure)

    def all_agree(self, taken: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether a bool scalar is true on every rank of the run."""
        if self.mesh is None:
            return taken
        votes = taken.to(torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return votes.bool()


def local(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The part of a tensor that this rank holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: Shaped[Tensor, "..."]) -> Box:
    """Where the part that this rank holds lies in the whole tensor, cut along each axis as `torch.chunk` cuts it."""
    bounds = [(0, size) for size in tensor.shape]
    for place, ranks, number in splits(tensor):
        start, stop = bounds[place]
        part = -(-(stop - start) // len(ranks))
        first = min(start + part * number, stop)
        bounds[place] = first, min(first + part, stop)
    box = tuple(slice(start, stop) for start, stop in bounds)
    assert local(tensor).shape == tuple(side.stop - side.start for side in box), f"the part is not that of {box}"
    return box


def splits(tensor: Shaped[Tensor, "..."]) -> list[tuple[int, list[int], int]]:
    """The axis of each split of a tensor, from the outermost, the ranks that share it, and this one's place there."""
    if not isinstance(tensor, DTensor):
        return []
    devices = tensor.device_mesh
    return [
        (placed.dim, dist.get_process_group_ranks(devices.get_group(axis)), devices.get_local_rank(axis))
        for axis, placed in enumerate(tensor.placements)
        if isinstance(placed, Shard)
    ]


def global_norm(tensors: Sequence[Float[Tensor, "..."]], stages: int = 1) -> Float[Tensor, ""]:
    """The Euclidean norm of all tensors together, in at least float32; of sharded ones with the parts of all ranks, and
    the same bits on each.

    Args:
        stages: of a pipeline, whose ranks give other tensors.
    """
    if stages == 1 and not any(isinstance(tensor, DTensor) for tensor in tensors):
        return torch.linalg.vector_norm(torch.stack(_norms(tensors))) if tensors else torch.zeros(())
    wide = [local(tensor).to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    squares = [part.square().sum() / _holders(tensor, stages) for part, tensor in zip(wide, tensors, strict=True)]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each tensor or each part of it, in at least float32; those of one dtype are read in one pass."""
    wide = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    parts = [part for tensor in tensors for part in _parts(tensor)]
    alike = [[part for part in parts if part.dtype == dtype] for dtype in {each.dtype: 0 for each in tensors}]
    norms = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    return [norm for some in alike for norm in norms(some, 2.0, dtype=wide)]


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """Of which torch gives the norm to a rounding or two."""
    return tensor.reshape(-1).split(READ) if tensor.device.type == "cpu" else (tensor,)


def _holders(tensor: Tensor, stages: int) -> int:
    """How many ranks hold the same part of a tensor."""
    ranks = dist.get_world_size() // stages
    if not isinstance(tensor, DTensor):
        return ranks
    parts = [
        tensor.device_mesh.size(axis)
        for axis, placed in enumerate(tensor.placements)
        if not isinstance(placed, Replicate)
    ]
    return ranks // torch.Size(parts).numel()
