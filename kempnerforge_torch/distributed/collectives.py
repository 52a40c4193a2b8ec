"""Sums and exchanges over ranks, most of which gradients flow through.

Shapes: R rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed import distributed_c10d

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_group_named: Any = distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]


def copied(x: Shaped[Tensor, "..."], group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """The same tensor, which each rank uses differently: its gradient is the sum of theirs."""
    return _Copied.apply(x, group)


def summed_over(x: Shaped[Tensor, "..."], group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """The sum over ranks, which all use in the same way: each has its whole gradient."""
    return _Summed.apply(x, group)


def gathered(
    x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup, sums: torch.dtype | None = None
) -> Shaped[Tensor, "..."]:
    """What the ranks have, one after another along an axis. Ranks use it in different ways: the gradient of a part is
    the sum of theirs.

    Args:
        sums: the dtype of these sums; that of the gradients if None. What is sent has that of the gradients.
    """
    return _Gathered.apply(x, axis, group, sums)


def gathered_alike(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """What the ranks have, one after another along an axis. All use it in the same way: each has the whole gradient of
    its part.
    """
    return _GatheredAlike.apply(x, axis, group, None)


def scattered(
    x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup, gradients: torch.dtype | None = None
) -> Shaped[Tensor, "..."]:
    """This rank's part, along an axis, of the sum over ranks: the gradient of a summand is those of all parts.

    Args:
        gradients: a narrower dtype in which they are gathered, as that to which the result is cast, which they fit.
    """
    return _Scattered.apply(x, axis, group, gradients)


def cut(x: Shaped[Tensor, "..."], axis: int, group: dist.ProcessGroup) -> Shaped[Tensor, "..."]:
    """This rank's part, along an axis, of what all have alike: each has the gradients of all parts."""
    return _Cut.apply(x, axis, group, None)


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
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup, sums: torch.dtype | None) -> Tensor:
        ctx.axis, ctx.group, ctx.sums = axis, group, sums
        return _gather(x, axis, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _scatter(dy, ctx.axis, ctx.group, ctx.sums), None, None, None


class _GatheredAlike(_Gathered):
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy.chunk(ctx.group.size(), ctx.axis)[ctx.group.rank()], None, None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup, gradients: torch.dtype | None) -> Tensor:
        ctx.axis, ctx.group, ctx.gradients = axis, group, gradients or x.dtype
        return _scatter(x, axis, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(dy.to(ctx.gradients), ctx.axis, ctx.group).to(dy.dtype), None, None, None


class _Cut(_Scattered):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, group: dist.ProcessGroup, gradients: torch.dtype | None) -> Tensor:
        ctx.axis, ctx.group, ctx.gradients = axis, group, gradients or x.dtype
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


# Operators of their own, which compilers take as they are: of collectives that write into tensors torch 2.11 loses some
# in the backward pass of a compiled block.


def _gather(x: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    return torch.cat(_gathered_rows(x, group.size(), group.group_name).chunk(group.size()), axis)


def _scatter(x: Tensor, axis: int, group: dist.ProcessGroup, sums: torch.dtype | None = None) -> Tensor:
    ranks, parts = group.size(), torch.cat(x.chunk(group.size(), axis))
    if sums is None or sums == x.dtype:
        return _scattered_rows(parts, ranks, group.group_name)
    each = [parts.shape[0] // ranks] * ranks
    summands = _exchanged_rows(parts, each, each, group.group_name)
    return torch.unflatten(summands, 0, (ranks, -1)).sum(dim=0, dtype=sums).to(x.dtype)


def _exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    return _exchanged_rows(rows, list(sent), list(received), group.group_name)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _total(x, group.group_name)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Tensor]], Any]:
    return torch.library.custom_op(f"kempnerforge::{name}", mutates_args=(), schema=schema)


@_operator("gathered_rows", "(Tensor x, SymInt ranks, str group) -> Tensor")
def _gathered_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    rows = _rows(x, ranks * x.shape[0])
    _all_gather(rows, x.contiguous(), group=_group_named(group))
    return rows


@_gathered_rows.register_fake
def _(x: Tensor, ranks: int, group: str) -> Tensor:
    return _rows(x, ranks * x.shape[0])


@_operator("scattered_rows", "(Tensor x, SymInt ranks, str group) -> Tensor")
def _scattered_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    rows = _rows(x, x.shape[0] // ranks)
    _reduce_scatter(rows, x.contiguous(), group=_group_named(group))
    return rows


@_scattered_rows.register_fake
def _(x: Tensor, ranks: int, group: str) -> Tensor:
    return _rows(x, x.shape[0] // ranks)


@_operator("exchanged_rows", "(Tensor x, SymInt[] sent, SymInt[] received, str group) -> Tensor")
def _exchanged_rows(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    rows = _rows(x, sum(received))
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=_group_named(group))
    return rows


@_exchanged_rows.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return _rows(x, sum(received))


@_operator("total", "(Tensor x, str group) -> Tensor")
def _total(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group_named(group))
    return total


@_total.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, *x.shape[1:])
