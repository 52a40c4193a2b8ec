"""Token embedding and output head. Shapes: B batch, S sequence, D model dim, V vocabulary."""

from __future__ import annotations

import numpy as np

from tests.oracle.linear import Gradients, Weights, linear, linear_backward


def token_embedding(tokens_BS: np.ndarray, weights: Weights) -> np.ndarray:
    """Row ``token`` of "embedding.weight" (V, D), for each token.

    Raises:
        ValueError: a token outside [0, V).
    """
    table_VD = weights["embedding.weight"]
    outside = (tokens_BS < 0) | (tokens_BS >= len(table_VD))
    if outside.any():
        raise ValueError(f"tokens = {tokens_BS[outside][0]}: must be in [0, {len(table_VD)})")
    return table_VD[tokens_BS]


def token_embedding_backward(dy_BSD: np.ndarray, tokens_BS: np.ndarray, weights: Weights) -> Gradients:
    """Each token adds its gradient to its row."""
    gradient_VD = np.zeros_like(weights["embedding.weight"])
    np.add.at(gradient_VD, tokens_BS, dy_BSD)
    return {"embedding.weight": gradient_VD}


def output_head(x_BSD: np.ndarray, weights: Weights) -> np.ndarray:
    """Logits (B, S, V) by "proj.weight" (V, D), which is the embedding table when weights are tied."""
    return linear(x_BSD, weights, "proj")


def output_head_backward(dy_BSV: np.ndarray, x_BSD: np.ndarray, weights: Weights) -> tuple[np.ndarray, Gradients]:
    return linear_backward(dy_BSV, x_BSD, weights, "proj")
