"""Adapters from vision features to the language model's width.

Shapes: B batch, N image tokens in a square grid of side g, M tokens after pooling, F feature dim, D model dim.
"""

from __future__ import annotations

import math

import numpy as np

from shared_config.schema.adapter import AdapterConfig
from tests.oracle.attention import attend, heads_first, heads_merged, split_heads
from tests.oracle.linear import Weights, linear
from tests.oracle.mlp import ACTIVATIONS


def adapter(x_BNF: np.ndarray, weights: Weights, config: AdapterConfig) -> np.ndarray:
    """(B, N, F) -> (B, M, D); M = N unless the adapter pools."""
    if config.type == "mlp_2layer":
        return linear(ACTIVATIONS[config.activation](linear(x_BNF, weights, "proj1")), weights, "proj2")
    if config.type == "linear":
        return linear(x_BNF, weights, "proj")
    if config.type == "avgpool":
        return linear(window_means(x_BNF, config.pool_window), weights, "proj")
    if config.type == "attentional_pool":
        return attentional_pool(x_BNF, weights, config.pool_window, config.pool_heads)
    raise KeyError(f"Unknown adapter: {config.type!r}")


def window_cells(tokens: int, window: int) -> list[list[int]]:
    """For each window of the grid, in reading order, its cells; windows at the right and lower edge may have fewer."""
    side = math.isqrt(tokens)
    starts = range(0, side, window)
    return [
        [
            row * side + column
            for row in range(top, min(top + window, side))
            for column in range(left, min(left + window, side))
        ]
        for top in starts
        for left in starts
    ]


def window_means(x_BNF: np.ndarray, window: int) -> np.ndarray:
    """Mean over the real cells of each window."""
    return np.stack([x_BNF[:, cells].mean(axis=1) for cells in window_cells(x_BNF.shape[1], window)], axis=1)


def attentional_pool(x_BNF: np.ndarray, weights: Weights, window: int, heads: int) -> np.ndarray:
    """In each window one query, its mean, attends to its cells; then two linear layers, o_proj and out_proj."""
    pooled = []
    for cells in window_cells(x_BNF.shape[1], window):
        inside_BCF = x_BNF[:, cells]
        query_B1F = inside_BCF.mean(axis=1, keepdims=True)
        q, k, v = (
            heads_first(split_heads(linear(source, weights, f"{name}_proj"), heads))
            for name, source in (("q", query_B1F), ("k", inside_BCF), ("v", inside_BCF))
        )
        context, _ = attend(q, k, v, np.ones((len(x_BNF), 1, len(cells)), dtype=bool))
        pooled.append(linear(linear(heads_merged(context), weights, "o_proj"), weights, "out_proj"))
    return np.concatenate(pooled, axis=1)
