"""How many tokens an expert chooses, in integers: no rounding of a product may move a ceiling.

Written with //, %, * and + alone, so that the number of tokens may be an int or an integer array of either backend.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

Count = TypeVar("Count")

MAX_DENOMINATOR = 10_000
"""Capacity factors count with four decimals; products then stay below 2^31 for any number of tokens below it."""


def choice_share(experts: int, capacity_factor: float) -> Fraction:
    """The share of a modality's tokens that one expert takes; factor 0 stands for one over the number of experts.

    The factor is read as the decimal number it was written as, so 0.07 is 7/100 and not the float beside it; a third
    written with many digits is a third.
    """
    if capacity_factor == 0:
        return Fraction(1, experts)
    return Fraction(str(capacity_factor)).limit_denominator(MAX_DENOMINATOR)


def choice_capacity(tokens: Count, experts: int, capacity_factor: float) -> Count:
    """ceil(share * tokens): tokens that each expert takes."""
    share = choice_share(experts, capacity_factor)
    n, d = share.numerator, share.denominator
    count: int = tokens  # type: ignore[assignment]
    return n * (count // d) + (n * (count % d) + d - 1) // d  # type: ignore[return-value]
