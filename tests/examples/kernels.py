"""A reference of attention in NumPy, written from its formula (arXiv:1706.03762, equation 1)."""

from __future__ import annotations

import numpy as np


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_causal: bool) -> np.ndarray:
    """softmax(q k^T / sqrt(h)) v, of q (B, H, S, h) and k, v (B, H, T, h); query s sees keys up to s if causal."""
    scores = q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True) @ v
