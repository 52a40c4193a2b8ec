"""The constants of Muon."""

from __future__ import annotations

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of a step of the iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""
EPS = 1e-7
"""Added to the norm of a matrix before it is divided by it."""
STEP_SIZE = 0.2
"""RMS of a step, as that of AdamW's usually is (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""
