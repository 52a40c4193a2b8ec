"""Token embedding and output head.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Integer

from kempnerforge_jax.model.checks import check_ids
from kempnerforge_jax.model.factors import divided, scaled
from kempnerforge_jax.model.linear import Embedding, Linear, linear
from kempnerforge_jax.model.module import Module
from kempnerforge_jax.model.softcap import soft_capped


class FactoredLogits(NamedTuple):
    """Logits that are not multiplied yet: x weight^T / divisor, capped.

    Attributes:
        x: (B, S, D), what enters the head.
        weight: (V, D), in the dtype of x.
        divisor: a number.
        softcap: as for `soft_capped`.
    """

    x: Float[Array, "B S D"]
    weight: Float[Array, "V D"]
    divisor: float = 1.0
    softcap: float | None = None

    def whole(self) -> Float[Array, "B S V"]:
        """The product, divided and capped."""
        return self.finished(linear(self.x, self.weight))

    def finished(self, product: Float[Array, "..."]) -> Float[Array, "..."]:
        """Logits from a product."""
        return soft_capped(divided(product, self.divisor), self.softcap)


class TokenEmbedding(Module):
    """Token ids to vectors, times a factor; the table is ``embedding.weight`` (V, D)."""

    def __init__(self, vocab_size: int, dim: int, scale: float = 1.0, *, rngs: nnx.Rngs | None):
        self.embedding = Embedding(vocab_size, dim, rngs=rngs)
        self.scale = scale

    def forward(self, tokens: Integer[Array, "B S"]) -> Float[Array, "B S D"]:
        """Integers (B, S) -> (B, S, D).

        Raises:
            ValueError: not integers, an id outside [0, V). Inside jit, where values can't be seen, its row is NaN.
        """
        check_ids("tokens", tokens, self.embedding.num_embeddings)
        x_BSD = self.embedding(tokens)
        return scaled(x_BSD, self.scale)


class _Projection(Linear):
    """The map of a head, by its own weight or by one that it is given."""

    def forward(self, x: jax.Array, tied_weight: jax.Array | None = None) -> jax.Array:
        return super().forward(x) if tied_weight is None else linear(x, tied_weight)


class OutputHead(Module):
    """Hidden states to logits, divided by a number and capped; the weight is ``proj.weight`` (V, D)."""

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        divisor: float = 1.0,
        softcap: float | None = None,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.proj = _Projection(dim, vocab_size, rngs=rngs)
        self.divisor = divisor
        self.softcap = softcap

    def forward(
        self, x: Float[Array, "B S D"], tied_weight: Float[Array, "V D"] | None = None
    ) -> Float[Array, "B S V"]:
        """(B, S, D) -> (B, S, V); a tied head is given the embedding's table (V, D) at each call."""
        return soft_capped(divided(self.proj(x, tied_weight), self.divisor), self.softcap)

    def factors(self, x: Float[Array, "B S D"], tied_weight: Float[Array, "V D"] | None = None) -> FactoredLogits:
        """What `forward` multiplies."""
        factors = self.proj.factors(x) if tied_weight is None else (x, tied_weight)
        return FactoredLogits(*factors, self.divisor, self.softcap)

    def tie_weights(self, embedding: TokenEmbedding) -> None:
        """Give up the own weight for the embedding's table, which each call passes: no array belongs to two modules.

        Raises:
            ValueError: if the shapes differ.
        """
        tied, own = embedding.embedding.weight.shape, (self.proj.out_features, self.proj.in_features)
        if tuple(tied) != own:
            raise ValueError(f"embedding.weight = {tuple(tied)}: must have the head's shape {own}")
        self.proj.weight = None
