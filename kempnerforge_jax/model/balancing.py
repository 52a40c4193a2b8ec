"""Balancing of experts outside the forward: the biases of routers are updated from the counts of whole steps.

Shapes: _E experts of a router, each its own number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Num

from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.stack import Stack
from kempnerforge_jax.model.wrappers import plain_modules
from shared_config.contract.routing import RouterId, router_ids, router_place


def balance(
    model: nnx.Module,
    counts: Mapping[RouterId, Num[Array, "_E"]],
    progress: Float[Array, ""] | float | None = None,
    taken: Bool[Array, ""] | None = None,
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
        place = router_place(path)
        if place is None or not hasattr(router, "update_bias"):
            continue
        ids = router_ids(path, Stack.named(place[0]).layers)
        if not all(router_id in counts for router_id in ids):
            continue
        own = [counts[router_id] for router_id in ids]
        before = [(variable, variable.get_value()) for _, variable in named_variables(router)]
        router.update_bias(own[0] if len(own) == 1 else jnp.stack(own), *schedule)
        if taken is not None:
            for variable, value in before:
                variable.set_value(jnp.where(taken, variable.get_value(), value))
