"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864); angles are formed in float64 by `shared_config`.

Shapes: B batch, S sequence, h head_dim, A = h/2 angles, P positions in the table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from shared_config.contract.rope import rope_tables
from shared_config.schema.model import RopeScaling


def precompute_rope_frequencies(
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[Float[Tensor, "P A"], Float[Tensor, "P A"]]:
    """Cosines and sines of every position.

    Returns:
        cos, sin: float64 (max_seq_len, head_dim // 2).

    Raises:
        ValueError: if ``head_dim`` is odd or not positive.
    """
    cos, sin = rope_tables(head_dim, max_seq_len, theta, scaling)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


class RotaryTables(nn.Module):
    """The tables of a model: float64 whatever dtype the model is cast to, on its device, not in its state dict."""

    cos: Float[Tensor, "P A"]
    sin: Float[Tensor, "P A"]

    def __init__(self, head_dim: int, max_seq_len: int, theta: float = 10000.0, scaling: RopeScaling | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        self.scaling = scaling
        cos_Ph, sin_Ph = self._precompute(torch.get_default_device())
        self.register_buffer("cos", cos_Ph, persistent=False)
        self.register_buffer("sin", sin_Ph, persistent=False)

    def reset(self) -> None:
        """Compute the tables again, where they are now (after `to_empty`)."""
        self.cos, self.sin = self._precompute(self.cos.device)

    def forward(
        self, positions: Integer[Tensor, "... S"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "... S A"], Float[Tensor, "... S A"]]:
        """Rows of the tables for `apply_rope`, in at least float32.

        Args:
            positions: integers (S,), or (B, S) where rows differ.
            dtype: of the queries and keys.

        Returns:
            cos, sin: (S, h/2), or (B, 1, S, h/2), which broadcasts over heads.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        return (cos, sin) if positions.ndim == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))

    def _precompute(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return precompute_rope_frequencies(self.head_dim, self.max_seq_len, self.theta, device, self.scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        cos_Ph, sin_Ph = self.cos, self.sin
        super()._apply(fn, recurse)
        device = self.cos.device
        if cos_Ph.is_meta:
            self.cos, self.sin = self._precompute(device)
        else:
            self.cos, self.sin = cos_Ph.to(device), sin_Ph.to(device)
        return self


def apply_rope(
    x: Float[Tensor, "... S h"], cos: Float[Tensor, "... h//2"], sin: Float[Tensor, "... h//2"]
) -> Float[Tensor, "... S h"]:
    """Turn the halves of each head: [x1 cos - x2 sin, x2 cos + x1 sin], in at least float32.

    Args:
        x: (..., S, h).
        cos, sin: (S, h/2), or any shape that broadcasts against (..., S, h/2).

    Returns:
        (..., S, h), in the dtype of ``x``.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
