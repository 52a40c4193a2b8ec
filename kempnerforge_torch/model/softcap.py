"""Soft caps on scores and logits (Gemma Team 2024, arXiv:2408.00118)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def soft_capped(scores: Float[Tensor, "..."], cap: float | None) -> Float[Tensor, "..."]:
    """cap * tanh(scores / cap), found in at least float32 and given in their dtype; without a cap they stay."""
    if cap is None:
        return scores
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return (cap * torch.tanh(scores.to(dtype) / cap)).to(scores.dtype)
