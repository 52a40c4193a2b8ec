"""A small language model in PyTorch, as somebody else wrote it; `small_in_numpy` and others are ports of it.

kempnerforge compare tests.examples.small_in_torch:theirs tests.examples.small_in_numpy:ours \\
    --map tests/examples/small.toml --common --refeed

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kempnerforge_torch.parity import record
from shared_config.parity import Trace
from tests.examples.small import EPS, HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, WIDTH, weights


class Attention(nn.Module):
    """Causal attention, (B, S, D) to (B, S, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = (part.view(B, S, HEADS, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """Attention and a gated layer, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH, eps=EPS), Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Small(nn.Module):
    """Logits (B, S, V) of tokens (B, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=EPS), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def theirs(**options: Any) -> Trace:
    """A recording of it."""
    with torch.random.fork_rng():
        model = Small()
    return record(model, (TOKENS,), weights=weights(), **options)
