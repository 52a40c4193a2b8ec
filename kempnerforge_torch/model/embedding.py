"""Token embedding and output head.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kempnerforge_torch.model.checks import check_ids
from kempnerforge_torch.model.factors import divided, scaled
from kempnerforge_torch.model.linear import Embedding, Linear, linear
from kempnerforge_torch.model.softcap import soft_capped


class FactoredLogits(NamedTuple):
    """Logits that are not multiplied yet: x weight^T / divisor, capped.

    Attributes:
        x: (B, S, D), what enters the head.
        weight: (V, D), in the dtype of x.
        divisor: a number.
        softcap: as for `soft_capped`.
    """

    x: Float[Tensor, "B S D"]
    weight: Float[Tensor, "V D"]
    divisor: float = 1.0
    softcap: float | None = None

    def whole(self) -> Float[Tensor, "B S V"]:
        """The product, divided and capped."""
        return self.finished(linear(self.x, self.weight))

    def finished(self, product: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Logits from a product."""
        return soft_capped(divided(product, self.divisor), self.softcap)


class TokenEmbedding(nn.Module):
    """Token ids to vectors, times a factor; the table is ``embedding.weight`` (V, D)."""

    def __init__(self, vocab_size: int, dim: int, scale: float = 1.0):
        super().__init__()
        self.embedding = Embedding(vocab_size, dim)
        self.scale = scale

    def forward(self, tokens: Integer[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Integers (B, S) -> (B, S, D).

        Raises:
            ValueError: not integers; an id outside [0, V), on the CPU. On a GPU or compiled, the device's own bounds
                check raises.
        """
        check_ids("tokens", tokens)
        tokens = tokens if tokens.dtype in (torch.int32, torch.int64) else tokens.long()
        x_BSD = self._look_up(tokens)
        return scaled(x_BSD, self.scale)

    def _look_up(self, tokens: Tensor) -> Tensor:
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return self.embedding(tokens)
        try:
            return self.embedding(tokens)
        except IndexError:
            check_ids("tokens", tokens, self.embedding.num_embeddings)
            raise


class OutputHead(nn.Module):
    """Hidden states to logits, divided by a number and capped; the weight is ``proj.weight`` (V, D)."""

    def __init__(self, dim: int, vocab_size: int, divisor: float = 1.0, softcap: float | None = None):
        super().__init__()
        self.proj = Linear(dim, vocab_size, bias=False)
        self.divisor = divisor
        self.softcap = softcap

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S V"]:
        """(B, S, D) -> (B, S, V)."""
        return soft_capped(divided(self.proj(x), self.divisor), self.softcap)

    def factors(self, x: Float[Tensor, "B S D"]) -> FactoredLogits:
        """What `forward` multiplies."""
        return FactoredLogits(*self.proj.factors(x), self.divisor, self.softcap)

    def tie_weights(self, embedding: TokenEmbedding) -> None:
        """Use the embedding's table as the weight.

        Raises:
            ValueError: if the shapes differ.
        """
        tied, own = embedding.embedding.weight, self.proj.weight
        if tied.shape != own.shape:
            raise ValueError(f"embedding.weight = {tuple(tied.shape)}: must have the head's shape {tuple(own.shape)}")
        self.proj.weight = tied
