"""The language model of `small_in_torch`, once more in NumPy: functions of a tree of weights, with taps.

Shapes: B batch, S sequence, D width, H heads, h head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shared_config.parity import Trace, nest, record, tap
from tests.examples.small import EPS, HEADS, TOKENS, weights


def small(weights: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits (B, S, V) of tokens (B, S)."""
    x = tap("embedding", weights["embed"]["weight"][tokens])
    for number, layer in enumerate(weights["blocks"]):
        name = f"layers.{number}"
        normed = tap(f"{name}.norm_1", norm(x, layer["attention_norm"], EPS))
        x = tap(f"{name}.middle", x + tap(f"{name}.mixer", attention(normed, layer["attention"])))
        normed = tap(f"{name}.norm_2", norm(x, layer["mlp_norm"], EPS))
        x = tap(name, x + tap(f"{name}.ffn", mlp(normed, layer["mlp"])))
    return tap("final_norm", norm(x, weights["norm"], EPS)) @ weights["head"]["weight"].T


def attention(x: np.ndarray, layer: Any) -> np.ndarray:
    """Causal attention, (B, S, D) to (B, S, D)."""
    B, S, D = x.shape
    q, k, v = (part.reshape(B, S, HEADS, -1) for part in np.split(linear(x, layer["qkv"]), 3, axis=-1))
    scores = np.einsum("bshd,bthd->bhst", q, k) / (D // HEADS) ** 0.5
    scores = np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = grown / grown.sum(axis=-1, keepdims=True)
    return linear(np.einsum("bhst,bthd->bshd", shares, v).reshape(B, S, D), layer["out"])


def mlp(x: np.ndarray, layers: Any) -> np.ndarray:
    """Two products with SiLU between them."""
    hidden = linear(x, layers[0])
    return linear(hidden / (1 + np.exp(-hidden)), layers[1])


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    """x W^T + b."""
    return x @ layer["weight"].T + layer["bias"]


def norm(x: np.ndarray, layer: Any, eps: float) -> np.ndarray:
    """LayerNorm (arXiv:1607.06450)."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * layer["weight"] + layer["bias"]


def ours(**options: Any) -> Trace:
    """A recording of it."""
    own = {name.replace("mlp.2", "mlp.1"): value for name, value in weights().items()}
    return record(small, (TOKENS,), weights=nest(own), **options)
