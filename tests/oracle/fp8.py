"""Linear maps in FP8 (Micikevicius et al. 2022, arXiv:2209.05433, table 1), on a grid of codes made from their bits.

Shapes: R rows, I inputs, O outputs, K what a scale belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Bits of the exponent and the mantissa, the exponent's bias, and the last code that is a finite number."""

    exponent: int
    mantissa: int
    bias: int
    last: int

    @property
    def values(self) -> np.ndarray:
        """Of the codes without a sign, in order: float64."""
        codes = np.arange(self.last + 1)
        field, fraction = codes >> self.mantissa, (codes & ((1 << self.mantissa) - 1)) / 2.0**self.mantissa
        return np.where(field == 0, fraction * 2.0 ** (1 - self.bias), (1 + fraction) * 2.0 ** (field - self.bias))


E4M3 = Grid(exponent=4, mantissa=3, bias=7, last=0x7E)
E5M2 = Grid(exponent=5, mantissa=2, bias=15, last=0x7B)
SMALLEST = np.float32(2.0**-90)


def quantise(x: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(R, K) -> numbers of the grid (R, K), NaN in rows that are not finite, and scales (R, 1), in float32."""
    values, x = grid.values, x.astype(np.float32)
    with np.errstate(invalid="ignore"):
        scales = np.maximum(np.abs(x).max(axis=1, keepdims=True), SMALLEST) * np.float32(1 / values[-1])
        scaled = (x * (np.float32(1) / scales)).astype(np.float64)
    sizes = np.minimum(np.abs(np.where(np.isfinite(scaled), scaled, 0)), values[-1])
    above = np.searchsorted(values, sizes)
    below = np.maximum(above - 1, 0)
    nearer = values[above] - sizes < sizes - values[below]
    tied = (values[above] - sizes == sizes - values[below]) & (above % 2 == 0)
    codes = np.copysign(values[np.where(nearer | tied, above, below)], scaled)
    return np.where(np.isnan(scaled), np.nan, codes).astype(np.float32), scales


def dequantised(x: np.ndarray, grid: Grid) -> np.ndarray:
    """What is left of the rows (R, K): float64."""
    codes, scales = quantise(x, grid)
    return codes.astype(np.float64) * scales.astype(np.float64)


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (R, I), weight (O, I) -> (R, O)."""
    return dequantised(x, E4M3) @ dequantised(weight, E4M3).T


def linear_backward(dy: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dy (R, O) -> the gradients of x (R, I) and of weight (O, I)."""
    dx = dequantised(dy, E5M2) @ dequantised(weight.T, E4M3).T
    return dx, dequantised(dy.T, E5M2) @ dequantised(x.T, E4M3).T
