"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), clipping by the global norm, and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from tests.oracle.linear import Weights


@dataclass(frozen=True)
class AdamWState:
    """First and second moments of each gradient, and the number of updates that each parameter took (0 if absent)."""

    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    steps: dict[str, int] = field(default_factory=dict)


def initial_state(parameters: Weights) -> AdamWState:
    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    return AdamWState(zeros, zeros)


def adamw_step(
    parameters: Weights,
    gradients: Weights,
    state: AdamWState,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decayed: Collection[str],
) -> tuple[dict[str, np.ndarray], AdamWState]:
    """p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p), the decay for the names in ``decayed`` only.

    A parameter without a gradient is frozen: it stays, and so does all that is kept of it.
    """
    beta1, beta2 = betas
    new, m, v, counts = dict(parameters), dict(state.m), dict(state.v), dict(state.steps)
    for name, p in parameters.items():
        if name not in gradients:
            continue
        g = gradients[name]
        steps = counts[name] = counts.get(name, 0) + 1
        m[name] = beta1 * state.m[name] + (1 - beta1) * g
        v[name] = beta2 * state.v[name] + (1 - beta2) * g * g
        m_hat = m[name] / (1 - beta1**steps)
        v_hat = v[name] / (1 - beta2**steps)
        decay = weight_decay if name in decayed else 0.0
        new[name] = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
    return new, AdamWState(m, v, counts)


def global_norm(gradients: Weights) -> float:
    """Euclidean norm of all gradients together."""
    return math.sqrt(sum(float(np.sum(g * g)) for g in gradients.values()))


def clip(gradients: Weights, max_norm: float) -> dict[str, np.ndarray]:
    """Gradients times max_norm / max(norm, max_norm): shortened to ``max_norm`` if longer, else unchanged."""
    factor = max_norm / max(global_norm(gradients), max_norm)
    return {name: g * factor for name, g in gradients.items()}


def learning_rate(
    step: int, *, lr: float, warmup_steps: int, decay_steps: int, min_lr_ratio: float, name: str = "cosine"
) -> float:
    """Step counts from 0. Warm-up: lr (step + 1) / warmup_steps. Then a fall to min_lr_ratio lr at ``decay_steps``."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / (decay_steps - warmup_steps), 1.0) if decay_steps > warmup_steps else 1.0
    remaining = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[name]
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
