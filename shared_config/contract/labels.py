"""Which labels count in a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

IGNORED = -100
"""The label of a position without a loss."""


def label_count(batches: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Labels that count in the loss, over all batches."""
    return sum(int(np.count_nonzero(batch["labels"] != IGNORED)) for batch in batches)
