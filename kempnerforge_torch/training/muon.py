"""Muon: momentum whose singular values are made equal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/),
scaled to the size of AdamW's steps (Liu et al. 2025, arXiv:2502.16982, equation 4), so that both share a learning rate.

    m <- b m + (1 - b) g            d = b m + (1 - b) g, or m without Nesterov's momentum
    p <- p - lr (0.2 sqrt(max(R, C)) orthogonal(d) + weight_decay p)

orthogonal(d) is a few steps of x <- A x + B (x x^T) x + C (x x^T)^2 x from d / |d|, in the dtype of the moments. A
stack of matrices, as of experts, is updated matrix by matrix.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kempnerforge_torch.distributed.ranks import box_of, local, splits
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training.groups import Group, with_gradients
from shared_config.contract.newton_schulz import EPS, STEP_SIZE, A, B, C
from shared_config.interchange.states import whole
from shared_config.schema.optimizer import OptimizerConfig


@registry.register("optimizer", "muon")
class Muon(torch.optim.Optimizer):
    """Muon of groups of matrices. Those that are split over ranks are gathered, and each rank updates its shard."""

    def __init__(self, groups: list[Group], config: OptimizerConfig):
        own = {"momentum": config.momentum, "nesterov": config.nesterov, "steps": config.newton_schulz_steps}
        super().__init__(groups, {"lr": config.lr, **own})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with the gradients of the parameters."""
        for group in self.param_groups:
            for parameter, gradient, state in with_gradients(self, group):
                p, m = local(parameter), state["exp_avg"]
                m.lerp_(gradient, 1 - group["momentum"])
                direction = gradient.lerp(m, group["momentum"]) if group["nesterov"] else m
                moved = _own_part_of_orthogonal(direction, group["steps"]) * _scale(parameter)
                p.sub_(moved.add_(p, alpha=group["weight_decay"]), alpha=group["lr"])


def orthogonal(x_RC: Float[Tensor, "*N R C"], steps: int) -> Float[Tensor, "*N R C"]:
    """Matrices with the singular vectors of ``x_RC``, and singular values near 1 after so many steps."""
    if x_RC.shape[-2] > x_RC.shape[-1]:
        return orthogonal(x_RC.mT, steps).mT
    x_RC = x_RC / (torch.linalg.matrix_norm(x_RC, keepdim=True) + EPS)
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.mT
        x_RC = A * x_RC + (B * gram_RR + C * gram_RR @ gram_RR) @ x_RC
    return x_RC


def _scale(matrix: Tensor) -> float:
    return STEP_SIZE * math.sqrt(max(matrix.shape[-2:]))


def _own_part_of_orthogonal(direction: Tensor, steps: int) -> Tensor:
    """This rank's part of what is computed of whole matrices; a stack that is split between matrices has them whole."""
    if all(axis < direction.ndim - 2 for axis, _, _ in splits(direction)):
        return orthogonal(local(direction), steps)
    return orthogonal(whole(direction), steps)[box_of(direction)]
