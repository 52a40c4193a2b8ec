"""How many tokens an expert takes, in integers: no rounding of a product may move a ceiling.

`choice_capacity` is written with //, %, * and + alone, so that the number of tokens may be an int or an integer array
of either backend.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

MAX_DENOMINATOR = 10_000
"""Capacity factors count with four decimals; products then stay below 2^31 for any number of tokens below it."""

Share = tuple[int, int]
"""Numerator and denominator."""
Count = TypeVar("Count")
"""A number of tokens: an integer, or an array of one."""


def choice_share(experts: int, capacity_factor: float) -> Share:
    """The share of a modality's tokens that one expert takes; factor 0 stands for one over the number of experts.

    The factor is read as the decimal number it was written as, so 0.07 is 7/100 and not the float beside it; a third
    written with many digits is a third. No factor is so small that an expert takes nothing.

    Raises:
        ValueError: a factor below 0 or above 1.
    """
    if not 0 <= capacity_factor <= 1:
        raise ValueError(
            f"capacity_factor = {capacity_factor}: must be from 0 to 1, a share of the tokens of a modality"
        )
    if capacity_factor == 0:
        return 1, experts
    share = max(Fraction(str(capacity_factor)).limit_denominator(MAX_DENOMINATOR), Fraction(1, MAX_DENOMINATOR))
    return share.numerator, share.denominator


def choice_capacity(tokens: Count, share: Share) -> Count:
    """ceil(share * tokens): how many each expert takes."""
    n, d = share
    number: Any = tokens
    return n * (number // d) + (n * (number % d) + d - 1) // d


def capacity_share(factor: float) -> Share | None:
    """The decimal digits of a factor as a fraction; None, no limit, for factor 0."""
    return Fraction(str(factor)).as_integer_ratio() if factor else None


def capacity(tokens: int, top_k: int, num_experts: int, factor: Share | None) -> int | None:
    """Assignments that an expert takes, by `capacity_share`: max(1, ceil(tokens k / E * factor)); None: any number."""
    if factor is None:
        return None
    numerator, denominator = factor
    return max(1, -(-tokens * top_k * numerator // (num_experts * denominator)))


def token_capacities(most: int, top_k: int, num_experts: int, factor: Share) -> np.ndarray:
    """The capacity for 0, 1, ..., ``most`` tokens that choose k experts each: int32 (most + 1,).

    max(1, ceil(tokens k / E * factor)), at most ``most``; to be looked up where the number of tokens is an array.
    """
    share = Fraction(*factor) * top_k / num_experts
    tokens = np.arange(most + 1, dtype=object)
    return np.clip(-(-tokens * share.numerator // share.denominator), 1, max(most, 1)).astype(np.int32)
