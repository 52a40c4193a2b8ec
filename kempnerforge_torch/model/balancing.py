"""Balancing of experts outside the forward: the biases of routers are updated from the counts of whole steps.

Shapes: _E experts of a router, each its own number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Num
from torch import Tensor, nn

from kempnerforge_torch.model.wrappers import plain_modules
from shared_config.contract.routing import RouterId, router_ids


@torch.no_grad()
def balance(
    model: nn.Module,
    counts: Mapping[RouterId, Num[Tensor, "_E"]],
    progress: float | None = None,
    taken: Bool[Tensor, ""] | None = None,
) -> None:
    """Update the balancing buffers of routers from the assignments of one optimiser step.

    Args:
        counts: (_E,) of each router, summed over all micro-batches and ranks; a router without counts is left as it is.
        progress: the share of the training that is done; None: as given to `set_moe_step`.
        taken: bool (), False where the step was skipped: then nothing changes.
    """
    schedule = () if progress is None else (progress,)
    for path, module in plain_modules(model).items():
        router: Any = module
        if not hasattr(router, "update_bias"):
            continue
        for router_id in router_ids(path):
            if router_id not in counts:
                continue
            before = {} if taken is None else {name: buffer.clone() for name, buffer in router.named_buffers()}
            router.update_bias(counts[router_id], *schedule)
            if taken is not None:
                for name, buffer in router.named_buffers():
                    buffer.copy_(torch.where(taken, buffer, before[name]))
