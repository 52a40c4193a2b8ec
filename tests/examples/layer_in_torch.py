"""A custom layer in PyTorch: gated attention over documents; `layer_in_jax` is the same.

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """Causal attention within documents, whose output a gate scales."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.gate = nn.Linear(dim, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (part.view(B, S, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        places = torch.arange(S)
        seen = (documents[:, :, None] == documents[:, None, :]) & (places[:, None] >= places)
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        mixed = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype) @ v
        mixed = mixed.transpose(1, 2).reshape(B, S, -1)
        return self.out(mixed * torch.sigmoid(self.gate(x)))
