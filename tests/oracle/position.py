"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and their scalings. Shapes: S positions, h head_dim."""

from __future__ import annotations

import math

import numpy as np

from shared_config.schema.model import RopeScaling


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn channel i together with channel i + h/2: x (..., S, h), cos and sin broadcast to (..., S, h/2)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def apply_rope_backward(dy: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The transposed map: the turn backwards."""
    return apply_rope(dy, cos, -sin)


def rope_at(
    positions: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles at integer ``positions`` of any shape: (*positions.shape, h/2)."""
    frequencies = np.array([frequency(pair, head_dim, theta, scaling) for pair in range(head_dim // 2)])
    angles = positions[..., None] * frequencies
    stretch = attention_factor(scaling)
    return np.cos(angles) * stretch, np.sin(angles) * stretch


def frequency(pair: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> float:
    """Radians per position of a channel pair; a scaling divides all or some frequencies by its factor."""
    plain = theta ** (-2 * pair / head_dim)
    if scaling is None or scaling.type == "none":
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    slowed = (
        _llama3_slowed(plain, scaling) if scaling.type == "llama3" else _yarn_slowed(pair, head_dim, theta, scaling)
    )
    return plain * (1 - slowed) + plain / scaling.factor * slowed


def attention_factor(scaling: RopeScaling | None) -> float:
    """YaRN lengthens queries and keys by 0.1 ln(factor) + 1; the others leave them."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _llama3_slowed(plain: float, scaling: RopeScaling) -> float:
    """Share of the slow frequency by wavelength (Llama 3.1): long waves 1, short waves 0."""
    assert scaling.original_max_seq_len is not None
    wavelength = 2 * math.pi / plain
    longest_kept = scaling.original_max_seq_len / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_seq_len / scaling.low_freq_factor
    if wavelength < longest_kept:
        return 0.0
    if wavelength > shortest_slowed:
        return 1.0
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return 1.0 - smooth


def _yarn_slowed(pair: int, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """Share of the slow frequency by channel: a ramp (Peng et al. 2023, arXiv:2309.00071, section 3.2)."""
    original_length = scaling.original_max_seq_len
    assert original_length is not None

    def channel_turning(rotations: float) -> float:
        """The real-valued pair that makes so many rotations within the original length."""
        wavelength = original_length / rotations
        return head_dim / 2 * math.log(wavelength / (2 * math.pi), theta)

    first = max(math.floor(channel_turning(scaling.beta_fast)), 0)
    last = min(math.ceil(channel_turning(scaling.beta_slow)), head_dim - 1)
    return min(max((pair - first) / max(last - first, 0.001), 0.0), 1.0)
