"""Normalisation layers; reductions in at least float32, results in the dtype of the input.

Shapes: ... any leading axes, D model dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kempnerforge_jax.model.module import Module
from kempnerforge_jax.registry import registry


@registry.register("norm", "rmsnorm")
class RMSNorm(Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs | None):
        self.dim = dim
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32))

    def forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """(..., D) -> (..., D), same dtype."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = x.astype(dtype)
        scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.factor(dtype)).astype(x.dtype)

    def factor(self, dtype: DTypeLike) -> Float[Array, "D"]:
        """What the normalised is multiplied by: (D,)."""
        return self.weight.get_value().astype(dtype)


@registry.register("norm", "rmsnorm_1p")
class UnitRMSNorm(RMSNorm):
    """x * rsqrt(mean(x^2) + eps) * (1 + weight): an `RMSNorm` whose weights decay towards 1 (as in Gemma)."""

    def __init__(self, dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs | None):
        super().__init__(dim, eps, rngs=rngs)
        self.weight.set_value(jnp.zeros(dim, jnp.float32))

    def factor(self, dtype: DTypeLike) -> Float[Array, "D"]:
        """1 + weight (D,)."""
        return 1 + super().factor(dtype)


@registry.register("norm", "layernorm")
class LayerNorm(Module):
    """(x - mean) * rsqrt(var + eps) * weight + bias over the last axis, variance biased and taken in a second pass."""

    def __init__(self, dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs | None):
        self.dim = dim
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))

    def forward(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """(..., D) -> (..., D), same dtype."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = x.astype(dtype)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.eps)
        weight, bias = self.weight.get_value().astype(dtype), self.bias.get_value().astype(dtype)
        return (centred * scale * weight + bias).astype(x.dtype)


def build_norm(norm_type: str, dim: int, eps: float = 1e-5, *, rngs: nnx.Rngs | None) -> Module:
    """The norm registered as ``norm_type``.

    Raises:
        KeyError: "Unknown norm: ..." with the names that exist.
    """
    return registry.get("norm", norm_type)(dim, eps, rngs=rngs)
