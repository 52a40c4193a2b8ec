"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

from __future__ import annotations

import numpy as np

from tests.oracle.linear import Gradients, Weights


def norm(x: np.ndarray, weights: Weights, norm_type: str, eps: float) -> np.ndarray:
    """The norm of that type with ``weights`` "weight" and, for LayerNorm, "bias"."""
    if norm_type == "rmsnorm":
        return rms_norm(x, weights["weight"], eps)
    if norm_type == "rmsnorm_1p":
        return rms_norm(x, 1 + weights["weight"], eps)
    if norm_type == "layernorm":
        return layer_norm(x, weights["weight"], weights["bias"], eps)
    raise KeyError(f"Unknown norm: {norm_type!r}")


def norm_backward(
    dy: np.ndarray, x: np.ndarray, weights: Weights, norm_type: str, eps: float
) -> tuple[np.ndarray, Gradients]:
    if norm_type == "rmsnorm":
        return rms_norm_backward(dy, x, weights["weight"], eps)
    if norm_type == "rmsnorm_1p":
        return rms_norm_backward(dy, x, 1 + weights["weight"], eps)
    return layer_norm_backward(dy, x, weights["weight"], eps)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / np.sqrt(_mean(x * x) + eps) * weight


def rms_norm_backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, Gradients]:
    """With r = 1/sqrt(mean(x^2) + eps): dx = r g - r^3 x mean(g x), g = dy * weight."""
    r = 1 / np.sqrt(_mean(x * x) + eps)
    g = dy * weight
    dx = r * g - r**3 * x * _mean(g * x)
    return dx, {"weight": _over_tokens(dy * x * r)}


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the biased variance, taken after the mean."""
    centred = x - _mean(x)
    return centred / np.sqrt(_mean(centred * centred) + eps) * weight + bias


def layer_norm_backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, Gradients]:
    """With n the normalised x: dx = (g - mean(g) - n mean(g n)) / sqrt(variance + eps), g = dy * weight."""
    centred = x - _mean(x)
    r = 1 / np.sqrt(_mean(centred * centred) + eps)
    n = centred * r
    g = dy * weight
    dx = r * (g - _mean(g) - n * _mean(g * n))
    return dx, {"weight": _over_tokens(dy * n), "bias": _over_tokens(dy)}


def _mean(x: np.ndarray) -> np.ndarray:
    return x.mean(axis=-1, keepdims=True)


def _over_tokens(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).sum(axis=0)
