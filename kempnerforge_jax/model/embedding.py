"""Token embedding and output head.

Shapes: B batch, S sequence, D model dim, V vocabulary.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from kempnerforge_jax.model.linear import Embedding, Linear
from kempnerforge_jax.model.module import Module


class TokenEmbedding(Module):
    """Token ids to vectors; the table is ``embedding.weight`` (V, D)."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: nnx.Rngs):
        self.embedding = Embedding(vocab_size, dim, rngs=rngs)

    def forward(self, tokens: jax.Array) -> jax.Array:
        """Integers (B, S) -> (B, S, D).

        Raises:
            ValueError: an id outside [0, V). Inside jit, where values can't be seen, its row is NaN.
        """
        if not isinstance(tokens, Tracer):
            _check_range(np.asarray(tokens), self.embedding.num_embeddings)
        return self.embedding(tokens)


class OutputHead(Module):
    """Hidden states to logits; the weight is ``proj.weight`` (V, D)."""

    def __init__(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs):
        self.proj = Linear(dim, vocab_size, rngs=rngs)

    def forward(self, x: jax.Array, tied_weight: jax.Array | None = None) -> jax.Array:
        """(B, S, D) -> (B, S, V); a tied head is given the embedding's table (V, D) at each call."""
        return self.proj(x, tied_weight)

    def tie_weights(self, embedding: TokenEmbedding) -> None:
        """Give up the own weight for the embedding's table, which each call passes: no array belongs to two modules.

        Raises:
            ValueError: if the shapes differ.
        """
        tied, own = embedding.embedding.weight.shape, (self.proj.out_features, self.proj.in_features)
        if tuple(tied) != own:
            raise ValueError(f"embedding.weight = {tuple(tied)}: must have the head's shape {own}")
        self.proj.weight = None


def _check_range(tokens: np.ndarray, vocab_size: int) -> None:
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(f"tokens = {bad[0]}: ids must be in [0, {vocab_size}); {bad.size} of {tokens.size} are not")
