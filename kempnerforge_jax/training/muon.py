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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kempnerforge_jax.registry import registry
from shared_config.contract.newton_schulz import EPS, STEP_SIZE, A, B, C
from shared_config.schema.optimizer import OptimizerConfig


class MuonState(NamedTuple):
    """What Muon keeps of a matrix."""

    count: Int[Array, ""]
    mu: Float[Array, "..."]


@registry.register("optimizer", "muon")
def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon of a matrix or a stack of them, but for the decay. The compiler gathers what is split over devices."""

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jnp.zeros_like(params))

    def step(updates: Any, state: Any, params: Any = None) -> tuple[jax.Array, MuonState]:
        b = config.momentum
        m = b * state.mu + (1 - b) * updates
        direction = b * m + (1 - b) * updates if config.nesterov else m
        moved = orthogonal(direction, config.newton_schulz_steps) * _scale(updates)
        return moved, MuonState(state.count + 1, m)

    return optax.GradientTransformation(init, step)


def orthogonal(x_RC: Float[Array, "*N R C"], steps: int) -> Float[Array, "*N R C"]:
    """Matrices with the singular vectors of ``x_RC``, and singular values near 1 after so many steps."""
    if x_RC.shape[-2] > x_RC.shape[-1]:
        return orthogonal(x_RC.mT, steps).mT
    x_RC = x_RC / (jnp.linalg.norm(x_RC, axis=(-2, -1), keepdims=True) + EPS)
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.mT
        x_RC = A * x_RC + (B * gram_RR + C * gram_RR @ gram_RR) @ x_RC
    return x_RC


def _scale(matrix: jax.Array) -> float:
    return STEP_SIZE * math.sqrt(max(matrix.shape[-2:]))
