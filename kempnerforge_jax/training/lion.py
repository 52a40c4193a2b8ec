"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

p <- p - lr (sign(b1 m + (1 - b1) g) + weight_decay p)            m <- b2 m + (1 - b2) g
"""

from __future__ import annotations

import optax

from kempnerforge_jax.registry import registry
from shared_config.schema.optimizer import OptimizerConfig


@registry.register("optimizer", "lion")
def lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """Lion, but for the decay."""
    return optax.scale_by_lion(*config.betas, mu_dtype=None)
