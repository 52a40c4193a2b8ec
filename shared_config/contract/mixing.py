"""Hashes of integers."""

from __future__ import annotations

import numpy as np

WEYL = np.uint64(0x9E3779B97F4A7C15)
"""What the state of SplitMix64 grows by."""


def splitmix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), uint64 -> uint64 of the same shape: a bijection of which
    every bit depends on every bit of the value.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
