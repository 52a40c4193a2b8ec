"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    v <- b2 v + (1 - b2) g^2        u = g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y
    z <- z - lr u                   x <- (1 - c) x + c z            y <- (1 - b1) z + b1 x

Gradients are taken at y, which is what is trained; x is the average of z, and what is evaluated. Kept are y and
d = z - y, which is 0 at the start; in these the step is

    y <- y + c d - lr (1 - b1 (1 - c)) u            d <- (1 - c) (d - b1 lr u)            x = y - d (1 - b1) / b1

c is a rate of each step: `shared_config.contract.schedule.average_share`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kempnerforge_jax.registry import registry
from kempnerforge_jax.training.whole import WholeUpdate
from shared_config.contract.schedule import Rates
from shared_config.schema.optimizer import OptimizerConfig


class ScheduleFreeState(NamedTuple):
    """What schedule-free AdamW keeps of a parameter."""

    count: Int[Array, ""]
    d: Float[Array, "..."]
    nu: Float[Array, "..."]


@registry.register("optimizer", "schedule_free_adamw")
def schedule_free_adamw(config: OptimizerConfig) -> WholeUpdate:
    """Schedule-free AdamW, decay and rates included."""

    def init(parameter: jax.Array) -> ScheduleFreeState:
        return ScheduleFreeState(jnp.zeros((), jnp.int32), jnp.zeros_like(parameter), jnp.zeros_like(parameter))

    def step(g: jax.Array, state: ScheduleFreeState, y: jax.Array, rates: Rates) -> tuple[jax.Array, ScheduleFreeState]:
        (b1, b2), lr, c = config.betas, rates.lr, rates.average
        count, d = state.count + 1, state.d
        v = b2 * state.nu + (1 - b2) * g * g
        u = g / (jnp.sqrt(v / (1 - jnp.asarray(b2, v.dtype) ** count)) + config.eps) + rates.decay * y
        y = y + c * d - lr * (1 - b1 * (1 - c)) * u
        return y, ScheduleFreeState(count, (1 - c) * (d - b1 * lr * u), v)

    return WholeUpdate(init, step)
