"""How many tokens an expert chooses, in integers: no rounding of a product may move a ceiling.

Written with //, %, * and + alone, so that the number of tokens may be an int or an integer array of either backend.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

MAX_DENOMINATOR = 10_000
"""Capacity factors count with four decimals; products then stay below 2^31 for any number of tokens below it."""

Share = tuple[int, int]
"""Numerator and denominator."""


def choice_share(experts: int, capacity_factor: float) -> Share:
    """The share of a modality's tokens that one expert takes; factor 0 stands for one over the number of experts.

    The factor is read as the decimal number it was written as, so 0.07 is 7/100 and not the float beside it; a third
    written with many digits is a third. No factor is so small that an expert takes nothing.
    """
    if capacity_factor == 0:
        return 1, experts
    share = max(Fraction(str(capacity_factor)).limit_denominator(MAX_DENOMINATOR), Fraction(1, MAX_DENOMINATOR))
    return share.numerator, share.denominator


def choice_capacity(tokens: Any, share: Share) -> Any:
    """ceil(share * tokens): how many each expert takes."""
    n, d = share
    return n * (tokens // d) + (n * (tokens % d) + d - 1) // d
