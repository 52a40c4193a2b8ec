"""Soft caps on scores and logits (Gemma Team 2024, arXiv:2408.00118)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_capped(scores: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(scores / cap), found in at least float32 and given in their dtype; without a cap they stay."""
    if cap is None:
        return scores
    dtype = jnp.promote_types(scores.dtype, jnp.float32)
    return (cap * jnp.tanh(scores.astype(dtype) / cap)).astype(scores.dtype)
