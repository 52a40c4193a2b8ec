"""Derivatives without automatic differentiation: what hand-written and backend gradients are held against.

`directional_derivative` steps into the complex plane (Squire & Trapp 1998, SIAM Review 40(1)): f(w + i s d) = f(w) + i
s f'(w) d + O(s^2), and with s = 1e-30 neither a difference nor the s^2 is left, so it is as exact as f itself: some
1e-14 relative on the functions of this folder, which branch on real parts and use no abs. `central_difference` needs
only real values, hence also takes a backend's function; its error is about 1e-10 relative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.oracle.linear import Gradients, Weights

COMPLEX_STEP = 1e-30
REAL_STEP = 1e-2
STENCIL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
"""Weights of f(w + n s d) - f(w - n s d): the central difference of order 8."""


def directional_derivative(
    function: Callable[[dict[str, np.ndarray]], Any], weights: Weights, direction: Weights
) -> Any:
    """Derivative of a scalar or array function of the oracle at ``weights``, along ``direction``; to about 1e-14
    relative.

    Args:
        function: weights -> number or array, built from the functions of this folder.
        direction: any of the weights' names -> array of the weight's shape; weights not named stay fixed.
    """
    moved = {name: np.asarray(value) for name, value in weights.items()}
    for name, step in direction.items():
        moved[name] = weights[name] + 1j * COMPLEX_STEP * step
    return np.imag(function(moved)) / COMPLEX_STEP


def central_difference(
    function: Callable[[dict[str, np.ndarray]], Any], weights: Weights, direction: Weights, step: float = REAL_STEP
) -> Any:
    """The same from real values in float64, by an eighth-order stencil of +-4 steps; about 1e-10 relative.

    That accuracy needs a ``direction`` of about a tenth of the weights' own size, since ``step`` times it must be small
    against the distance over which the function bends. A change of route within the stencil spoils it.
    """
    total: Any = 0.0
    for n, share in STENCIL.items():
        ahead, behind = ({**weights, **_moved(weights, direction, sign * n * step)} for sign in (1, -1))
        total = total + share * (np.asarray(function(ahead)) - np.asarray(function(behind)))
    return total / step


def random_direction(weights: Weights, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Standard normal numbers in the shape of each weight."""
    return {name: rng.standard_normal(np.shape(value)) for name, value in weights.items()}


def along(gradients: Mapping[str, np.ndarray], direction: Weights) -> float:
    """The directional derivative that ``gradients`` claim: the inner product over the direction's names."""
    return sum(float(np.sum(gradients[name] * step)) for name, step in direction.items())


def gradient_errors(
    function: Callable[[dict[str, np.ndarray]], Any],
    weights: Weights,
    gradients: Gradients,
    rng: np.random.Generator,
    directions: int = 2,
) -> dict[str, float]:
    """For each gradient the error of its derivative along random directions, relative to norm(gradient).

    A random direction d meets an error e of the gradient with |<e, d>| about norm(e), so this is a norm-wise relative
    error of each tensor, estimated from ``directions`` evaluations of a scalar ``function``.
    """
    errors = {}
    for name, gradient in gradients.items():
        scale = float(np.linalg.norm(gradient))
        gaps = []
        for _ in range(directions):
            direction = {name: rng.standard_normal(gradient.shape)}
            exact = float(directional_derivative(function, weights, direction))
            gaps.append(abs(along(gradients, direction) - exact))
        errors[name] = max(gaps) / scale if scale else (np.inf if max(gaps) else 0.0)
    return errors


def full_gradient(function: Callable[[dict[str, np.ndarray]], Any], weights: Weights, name: str) -> np.ndarray:
    """Every element of one weight's gradient of a scalar function, one complex step per element: for small tensors."""
    value = np.asarray(weights[name])
    gradient = np.empty(value.shape)
    for index in np.ndindex(value.shape):
        unit = np.zeros(value.shape)
        unit[index] = 1.0
        gradient[index] = directional_derivative(function, weights, {name: unit})
    return gradient


def _moved(weights: Weights, direction: Weights, distance: float) -> dict[str, np.ndarray]:
    return {name: weights[name] + distance * step for name, step in direction.items()}
