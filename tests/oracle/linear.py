"""The linear map, and the handling of flat dicts of weights and gradients. Shapes: I in, O out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]
Gradients = dict[str, np.ndarray]
Scalar = Any
"""A float; a complex number within a complex-step derivative."""


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """x (..., I) -> (..., O): x W^T, plus the bias if ``weights`` has one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def linear_backward(dy: np.ndarray, x: np.ndarray, weights: Weights, name: str) -> tuple[np.ndarray, Gradients]:
    """dx = dy W; dW = sum over tokens of dy x^T; the bias gets the sum of dy."""
    weight = weights[f"{name}.weight"]
    dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    gradients = {f"{name}.weight": dy_TO.T @ x_TI}
    if f"{name}.bias" in weights:
        gradients[f"{name}.bias"] = dy_TO.sum(axis=0)
    return dy @ weight, gradients


def submodule(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """The weights below ``path``, under their names relative to it."""
    start = path + "."
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def has(weights: Weights, path: str) -> bool:
    """Whether any weight lies below ``path``."""
    return any(name.startswith(path + ".") for name in weights)


def below(path: str, named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `submodule`: the same values, under names that start with ``path``."""
    return {f"{path}.{name}": value for name, value in named.items()}
