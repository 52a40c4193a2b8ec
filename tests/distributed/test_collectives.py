"""Sums over ranks of what is narrow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from kempnerforge_torch.distributed.collectives import gathered
from kempnerforge_torch.distributed.expert_parallel import gather_tokens
from kempnerforge_torch.distributed.spawn import together
from kempnerforge_torch.model.dispatch import Routes, plan_dispatch

RANKS = 3


def gradients() -> list[list[float]]:
    """Of what each rank has, along either axis, where summands are 256, 0.75 and 0.75 times the number of the part."""
    group, found = dist.group.WORLD, []
    assert group is not None
    for axis in (0, 1):
        x = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
        everything = gathered(x, axis, group, sums=torch.float32)
        part_of = torch.arange(1, RANKS + 1).repeat_interleave(2).reshape([-1, 1] if axis == 0 else [1, -1])
        everything.backward(((256.0 if group.rank() == 0 else 0.75) * part_of).expand_as(everything).bfloat16())
        assert x.grad is not None
        every = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(every, x.grad)
        found.append([each.unique().item() for each in every])
    return found


def test_narrow_gradients_are_sent_as_they_are_and_summed_in_float32() -> None:
    """257.5 is 258 in bfloat16, in which 256 + 0.75 is 256."""
    assert together(gradients, RANKS) == [[258.0, 516.0, 772.0]] * 2


def gradients_of_tokens() -> list[float]:
    """Of a token of each rank, of which the experts of one rank make 256 times what it is, and those of each other 0.75
    times; for each in turn.
    """
    group, found = dist.group.WORLD, []
    assert group is not None
    plan = plan_dispatch(torch.tensor([[group.rank()]]), None, RANKS)
    for large in range(RANKS):
        own = 256.0 if group.rank() == large else 0.75
        layer: Any = SimpleNamespace(num_experts=RANKS, _routed=lambda x_TD, _, own=own: x_TD * own)
        gather_tokens(layer, group)
        x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
        layer._routed(x_TD, Routes(torch.ones(1, 1), plan, None, True, None)).sum().backward()
        assert x_TD.grad is not None
        found.append(x_TD.grad.item())
    return found


def test_gradients_of_tokens_that_experts_of_all_ranks_see_are_summed_in_float32() -> None:
    """257.5 is 258 in bfloat16."""
    assert together(gradients_of_tokens, RANKS) == [258.0] * RANKS
