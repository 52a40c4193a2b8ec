"""Normalisation layers; reductions in at least float32, results in the dtype of the input.

Shapes: ... any leading axes, D model dim.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kempnerforge_torch.registry import registry


@registry.register("norm", "rmsnorm")
class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(..., D) -> (..., D), same dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.factor(dtype)).to(x.dtype)

    def factor(self, dtype: torch.dtype) -> Float[Tensor, "D"]:
        """What the normalised is multiplied by: (D,)."""
        return self.weight.to(dtype)


@registry.register("norm", "rmsnorm_1p")
class UnitRMSNorm(RMSNorm):
    """x * rsqrt(mean(x^2) + eps) * (1 + weight): an `RMSNorm` whose weights decay towards 1 (as in Gemma)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def factor(self, dtype: torch.dtype) -> Float[Tensor, "D"]:
        """1 + weight (D,)."""
        return 1 + super().factor(dtype)


@registry.register("norm", "layernorm")
class LayerNorm(nn.Module):
    """(x - mean) * rsqrt(var + eps) * weight + bias over the last axis, variance biased and taken in a second pass."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """(..., D) -> (..., D), same dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        centred = wide - wide.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps)
        return (centred * scale * self.weight.to(dtype) + self.bias.to(dtype)).to(x.dtype)


def build_norm(norm_type: str, dim: int, eps: float = 1e-5) -> nn.Module:
    """The norm registered as ``norm_type``.

    Raises:
        KeyError: "Unknown norm: ..." with the names that exist.
    """
    return registry.get("norm", norm_type)(dim, eps)
