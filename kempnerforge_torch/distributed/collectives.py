"""Sums and exchanges over ranks, most of which gradients flow through.

Shapes: R rows of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copied(x: Shaped[Tensor, "..."], group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """The same tensor, which each rank uses differently: its gradient is the sum of theirs."""
    return _Copied.apply(x, group)


def summed_over(x: Shaped[Tensor, "..."], group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """The sum over ranks, which all use in the same way: each has its whole gradient."""
    return _Summed.apply(x, group)


def gathered(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """What the ranks have, one after another along an axis. Ranks use it in different ways: the gradient of a part is
    the sum of theirs.
    """
    return _Gathered.apply(x, axis, group)


def gathered_alike(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """What the ranks have, one after another along an axis. All use it in the same way: each has the whole gradient of
    its part.
    """
    return _GatheredAlike.apply(x, axis, group)


def scattered(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """This rank's part, along an axis, of the sum over ranks: the gradient of a summand is those of all parts."""
    return _Scattered.apply(x, axis, group)


def cut(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """This rank's part, along an axis, of what all have alike: each has the gradients of all parts."""
    return _Cut.apply(x, axis, group)


def exchanged(
    rows: Shaped[Tensor, "R ..."], sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Shaped[Tensor, "_ ..."]:
    """The rows that the ranks have sent to this one, in the order of the ranks.

    Args:
        sent: how many of the rows, in order, go to each rank.
        received: how many come from each.
    """
    return _Exchanged.apply(rows, sent, received, group)


@torch.no_grad()
def add_up(tensors: Sequence[Shaped[Tensor, "..."]], group: dist.ProcessGroup) -> None:
    """Sum each tensor over the ranks, in place; all in one exchange."""
    if not tensors or group.size() == 1:
        return
    total = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(total, group=group)
    for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _sum(dy, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
        ctx.axis, ctx.group = axis, group
        return _gather(x, axis, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(dy, ctx.axis, ctx.group), None, None


class _GatheredAlike(_Gathered):
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.chunk(ctx.group.size(), ctx.axis)[ctx.group.rank()], None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
        ctx.axis, ctx.group = axis, group
        return _scatter(x, axis, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gather(dy, ctx.axis, ctx.group), None, None


class _Cut(_Scattered):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
        ctx.axis, ctx.group = axis, group
        return x.chunk(group.size(), axis)[group.rank()].clone(memory_format=torch.contiguous_format)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(dy, ctx.received, ctx.sent, ctx.group), None, None, None


def _gather(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts.chunk(group.size()), axis)


def _scatter(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    parts = x.chunk(group.size(), axis)
    own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    _reduce_scatter(own, torch.cat(parts), group=group)
    return own


def _exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=group)
    return result


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
