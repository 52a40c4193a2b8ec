"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

p <- p - lr (sign(b1 m + (1 - b1) g) + weight_decay p)            m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

import torch

from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training.groups import Group, with_gradients
from shared_config.schema.optimizer import OptimizerConfig


@registry.register("optimizer", "lion")
class Lion(torch.optim.Optimizer):
    """Lion of groups of parameters, each updated as the shard that its rank holds."""

    def __init__(self, groups: list[Group], config: OptimizerConfig):
        super().__init__(groups, {"lr": config.lr, "betas": config.betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with the gradients of the parameters."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for parameter, gradient, state in with_gradients(self, group):
                p, g, m = local(parameter), local(gradient), local(state["exp_avg"])
                moved = m.lerp(g, 1 - b1).sign_()
                m.lerp_(g, 1 - b2)
                p.sub_(moved.add_(p, alpha=group["weight_decay"]), alpha=group["lr"])
