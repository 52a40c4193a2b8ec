"""Who may see whom in attention, one query and one key at a time.

Shapes: B batch, S queries, M keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True)
class Token:
    """One token of one row.

    Attributes:
        real: whether it may be seen at all.
        prefix: how many of the first positions of its row see each other.
    """

    position: int
    document: int = 0
    real: bool = True
    prefix: int = 0


def may_see(query: Token, key: Token, *, causal: bool, window: int | None) -> bool:
    """Whether a query sees a key: none after it if ``causal``, none ``window`` or more positions before it, none of
    another document, none that isn't real. The first two do not hold within the prefix.
    """
    if max(query.position, key.position) >= query.prefix:
        if causal and key.position > query.position:
            return False
        if window is not None and query.position - key.position >= window:
            return False
    return key.real and key.document == query.document


def dense(queries: list[list[Token]], keys: list[list[Token]], *, causal: bool, window: int | None) -> np.ndarray:
    """bool (B, S, M), of the queries and the keys of each row."""
    seen = np.zeros((len(queries), len(queries[0]), len(keys[0])), dtype=bool)
    for row, query, key in product(*(range(size) for size in seen.shape)):
        seen[row, query, key] = may_see(queries[row][query], keys[row][key], causal=causal, window=window)
    return seen
