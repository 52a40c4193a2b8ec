"""Initial values that cost no time: those of a small pool, repeated."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def drawn() -> np.ndarray:
    """A million standard normal numbers, float32."""
    return np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)


def repeated(name: str, spec: Any, seed: int) -> np.ndarray:
    """In place of `shared_config.contract.initialise.initial_value`, which draws each number of a model of billions."""
    if not hasattr(spec.initializer, "std"):
        return np.full(spec.shape, spec.initializer.value, np.float32)
    return np.resize(drawn() * np.float32(spec.initializer.std), spec.shape)


def perturbed(name: str, spec: Any, seed: int) -> np.ndarray:
    """The same, each off by up to a rounding of float32."""
    values = repeated(name, spec, seed)
    off = np.random.default_rng(1).uniform(-1, 1, 1 << 20) * np.finfo(np.float32).eps
    return (values * (1 + np.resize(off, values.shape))).astype(np.float32)
