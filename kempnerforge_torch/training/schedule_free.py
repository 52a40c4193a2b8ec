"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    v <- b2 v + (1 - b2) g^2        u = g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y
    z <- z - lr u                   x <- (1 - c) x + c z            y <- (1 - b1) z + b1 x

Gradients are taken at y, which is what is trained; x is the average of z, and what is evaluated. Kept are y and
d = z - y, which is 0 at the start; in these the step is

    y <- y + c d - lr (1 - b1 (1 - c)) u            d <- (1 - c) (d - b1 lr u)            x = y - d (1 - b1) / b1

c is a rate of each step: `shared_config.contract.schedule.average_share`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.registry import registry
from kempnerforge_torch.training.groups import Group, Held, with_gradients
from shared_config.schema.optimizer import OptimizerConfig


@registry.register("optimizer", "schedule_free_adamw")
class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW of groups of parameters, each updated as the shard that its rank holds."""

    def __init__(self, groups: list[Group], config: OptimizerConfig):
        super().__init__(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps, "average": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step with the gradients of the parameters."""
        for group in self.param_groups:
            (b1, b2), lr, c = group["betas"], group["lr"], group["average"]
            held = with_gradients(self, group)
            for (parameter, gradient, state), correction in zip(held, _corrections(held, b2), strict=True):
                y, g, d, v = (local(tensor) for tensor in (parameter, gradient, state["d"], state["exp_avg_sq"]))
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                u = g / ((v / correction).sqrt_().add_(group["eps"]))
                u.add_(y, alpha=group["weight_decay"])
                y.add_(d, alpha=c).sub_(u, alpha=lr * (1 - b1 * (1 - c)))
                d.sub_(u, alpha=b1 * lr).mul_(1 - c)


def _corrections(held: Sequence[Held], b2: float) -> Sequence[Float[Tensor, ""]]:
    """1 - b2^t of each parameter, in float64, where the counts t are: the host does not wait for them."""
    return (1 - b2 ** torch.stack([state["step"] for _, _, state in held]).double()).unbind() if held else ()
