"""Decisions of routers: how many choices are unequal, not how far apart the numbers of the experts are."""

from __future__ import annotations

import numpy as np

from shared_config.parity.traces import ROUTES

COUNTS = ".expert_counts"
"""End of the names of how many choices each expert got."""


def is_routes(name: str) -> bool:
    """Whether a tensor of this name says what routers chose."""
    return name.endswith(ROUTES)


def unequal_choices(value: np.ndarray, reference: np.ndarray, experts_choose: bool) -> np.ndarray:
    """Which choices are not those of the reference: bool, of their shape.

    Args:
        experts_choose: whether a column holds the tokens that an expert takes, the best first, so that one that comes
            or goes moves all after it; else a row holds the experts of a token, the best first.
    """
    if not experts_choose:
        return value != reference
    columns = [~np.isin(*pair) for pair in zip(value.T, reference.T, strict=True)]
    return np.stack(columns, axis=1) if columns else np.zeros(value.shape, bool)
