"""Feed-forward layers: SwiGLU (Shazeer 2020, arXiv:2002.05202) and the plain two-layer form."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from tests.oracle.linear import Gradients, Weights, linear, linear_backward

Activations = dict[str, np.ndarray]


def mlp(x: np.ndarray, weights: Weights, activation: str) -> tuple[np.ndarray, Activations]:
    """silu: down(silu(gate(x)) * up(x)), geglu_tanh: the same with gelu_tanh; gelu and relu: down(act(up(x))). Also the
    output of each linear layer.
    """
    up = linear(x, weights, "up_proj")
    if activation in GATES:
        gate = linear(x, weights, "gate_proj")
        down = linear(GATES[activation][0](gate) * up, weights, "down_proj")
        return down, {"gate_proj": gate, "up_proj": up, "down_proj": down}
    down = linear(ACTIVATIONS[activation](up), weights, "down_proj")
    return down, {"up_proj": up, "down_proj": down}


def mlp_backward(
    dy: np.ndarray, x: np.ndarray, saved: Activations, weights: Weights, activation: str
) -> tuple[np.ndarray, Gradients]:
    up = saved["up_proj"]
    if activation not in GATES:
        dhidden, down_gradients = linear_backward(dy, ACTIVATIONS[activation](up), weights, "down_proj")
        dx, up_gradients = linear_backward(dhidden * SLOPES[activation](up), x, weights, "up_proj")
        return dx, {**up_gradients, **down_gradients}
    gate, (function, slope) = saved["gate_proj"], GATES[activation]
    dhidden, down_gradients = linear_backward(dy, function(gate) * up, weights, "down_proj")
    dx_gate, gate_gradients = linear_backward(dhidden * up * slope(gate), x, weights, "gate_proj")
    dx_up, up_gradients = linear_backward(dhidden * function(gate), x, weights, "up_proj")
    return dx_gate + dx_up, {**gate_gradients, **up_gradients, **down_gradients}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), written so that the exponential never overflows."""
    decayed = np.exp(np.where(np.real(x) >= 0, -x, x))
    return np.where(np.real(x) >= 0, 1 / (1 + decayed), decayed / (1 + decayed))


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def silu_slope(x: np.ndarray) -> np.ndarray:
    return sigmoid(x) * (1 + x * sigmoid(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function: x (1 + erf(x / sqrt 2)) / 2, exact."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_slope(x: np.ndarray) -> np.ndarray:
    return (1 + erf(x / math.sqrt(2))) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(1.702 x), the approximation CLIP was trained with."""
    return x * sigmoid(1.702 * x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of gelu (Hendrycks & Gimpel 2016, arXiv:1606.08415), which SigLIP was trained with."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    dinner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return (1 + np.tanh(inner)) / 2 + x * (1 - np.tanh(inner) ** 2) * dinner / 2


def relu(x: np.ndarray) -> np.ndarray:
    return np.where(np.real(x) > 0, x, 0)


def relu_slope(x: np.ndarray) -> np.ndarray:
    return np.where(np.real(x) > 0, 1.0, 0.0)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "relu": relu, "quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh}
GATES = {"silu": (silu, silu_slope), "geglu_tanh": (gelu_tanh, gelu_tanh_slope)}
SLOPES = {"silu": silu_slope, "gelu": gelu_slope, "relu": relu_slope}
