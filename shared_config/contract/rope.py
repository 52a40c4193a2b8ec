"""Tables of rotary position embeddings, in float64, for both backends.

Su et al. 2021, arXiv:2104.09864: channel pair i of a head turns by position * theta^(-2i/head_dim). Scalings: linear
position interpolation (Chen et al. 2023, arXiv:2306.15595), the wavelength bands of Llama 3.1 (arXiv:2407.21783),
and YaRN (Peng et al. 2023, arXiv:2309.00071).
"""

from __future__ import annotations

import math

import numpy as np

from shared_config.schema.model import RopeScaling


def rope_tables(
    head_dim: int, max_seq_len: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position and channel pair.

    Returns:
        cos, sin: float64 (max_seq_len, head_dim // 2), multiplied by YaRN's attention factor where that applies.

    Raises:
        ValueError: if ``head_dim`` is odd or not positive.
    """
    if head_dim < 2 or head_dim % 2 != 0:
        raise ValueError(f"head_dim = {head_dim}: must be an even number of at least 2")
    frequencies = inverse_frequencies(head_dim, theta, scaling)
    angles = np.arange(max_seq_len, dtype=np.float64)[:, None] * frequencies[None, :]
    factor = attention_factor(scaling)
    return np.cos(angles) * factor, np.sin(angles) * factor


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each channel pair: float64 (head_dim // 2,)."""
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None or scaling.type == "none":
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    keep = (
        _llama3_share_kept(plain, scaling) if scaling.type == "llama3" else _yarn_share_kept(head_dim, theta, scaling)
    )
    return keep * plain + (1 - keep) * plain / scaling.factor


def attention_factor(scaling: RopeScaling | None) -> float:
    """Factor on queries and keys alike; other than 1 for YaRN only (equation 22 of the paper)."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor if scaling.attention_factor is not None else 0.1 * math.log(scaling.factor) + 1.0


def _llama3_share_kept(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """1 for short wavelengths, 0 for long ones, linear in the number of rotations between."""
    rotations = _original_length(scaling) * plain / (2 * math.pi)
    share = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return np.clip(share, 0.0, 1.0)


def _yarn_share_kept(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 below the channel that makes ``beta_fast`` rotations in the trained context, 0 above that of ``beta_slow``."""

    def channel(rotations: float) -> float:
        return head_dim * math.log(_original_length(scaling) / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), head_dim - 1)
    span = max(high - low, 0.001)
    ramp = (np.arange(head_dim // 2, dtype=np.float64) - low) / span
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def _original_length(scaling: RopeScaling) -> int:
    assert scaling.original_max_seq_len is not None
    return scaling.original_max_seq_len
