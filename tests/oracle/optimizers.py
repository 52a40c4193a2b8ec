"""Lion, Muon and schedule-free AdamW, and the average of weights, from their papers; one parameter at a time.

Muon's iteration is computed on singular values: a polynomial in x x^T times x keeps the singular vectors of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Kept = dict[str, Any]


def lion(p: Array, g: Array, kept: Kept, *, lr: float, decay: float, betas: tuple[float, float]) -> tuple[Array, Kept]:
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    c = betas[0] * kept["m"] + (1 - betas[0]) * g
    return p - lr * (np.sign(c) + decay * p), {"m": betas[1] * kept["m"] + (1 - betas[1]) * g}


def adamw(
    p: Array, g: Array, kept: Kept, *, lr: float, decay: float, betas: tuple[float, float], eps: float, t: int
) -> tuple[Array, Kept]:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2."""
    m, v = betas[0] * kept["m"] + (1 - betas[0]) * g, betas[1] * kept["v"] + (1 - betas[1]) * g**2
    step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return p - lr * (step + decay * p), {"m": m, "v": v}


def orthogonal(x: Array, steps: int) -> Array:
    """Each singular value s of x / |x| becomes the value of 3.4445 s - 4.775 s^3 + 2.0315 s^5, ``steps`` times."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt(np.sum(x * x, axis=(-2, -1)))[..., None] + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s[..., None, :]) @ vt


def muon(
    p: Array, g: Array, kept: Kept, *, lr: float, decay: float, momentum: float, nesterov: bool, steps: int
) -> tuple[Array, Kept]:
    """Jordan et al. 2024, with the scale of Liu et al. 2025, arXiv:2502.16982, equation 4."""
    m = momentum * kept["m"] + (1 - momentum) * g
    direction = momentum * m + (1 - momentum) * g if nesterov else m
    step = 0.2 * np.sqrt(max(p.shape[-2:])) * orthogonal(direction, steps)
    return p - lr * (step + decay * p), {"m": m}


def schedule_free(
    y: Array,
    g: Array,
    kept: Kept,
    *,
    rates: Sequence[float],
    decay: float,
    betas: tuple[float, float],
    eps: float,
    t: int,
) -> tuple[Array, Kept]:
    """Defazio et al. 2024, arXiv:2405.15682, algorithm 1, with its three sequences.

    Args:
        kept: x, z and v.
        rates: the learning rates of all steps up to this one.
        t: updates of this parameter, with this one.
    """
    lr = rates[-1]
    v = betas[1] * kept["v"] + (1 - betas[1]) * g**2
    z = kept["z"] - lr * (g / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * y)
    c = lr**2 / sum(rate**2 for rate in rates)
    x = (1 - c) * kept["x"] + c * z
    return (1 - betas[0]) * z + betas[0] * x, {"x": x, "z": z, "v": v}


def averaged(ema: Array, p: Array, decay_rate: float) -> Array:
    """The average of weights after an update that gave p."""
    return decay_rate * ema + (1 - decay_rate) * p
