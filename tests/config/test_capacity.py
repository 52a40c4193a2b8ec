"""How many tokens an expert chooses: exact ceilings, whatever the numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared_config.contract.capacity import choice_capacity, choice_share


@given(st.integers(0, 2**31 - 1), st.integers(1, 512), st.integers(0, 10_000))
@example(100, 4, 700)
@example(2**31 - 1, 512, 9_999)
def test_capacity_is_the_exact_ceiling(tokens: int, experts: int, factor: int) -> None:
    """Also where the product of floats rounds up (0.07 * 100 = 7.000000000000001), and in 32 bits."""
    exact = Fraction(factor, 10_000) if factor else Fraction(1, experts)
    share = choice_share(experts, factor / 10_000)
    expected = math.ceil(exact * tokens)
    assert choice_capacity(tokens, share) == expected
    assert int(choice_capacity(np.array([tokens], np.int32), share)[0]) == expected


@pytest.mark.parametrize(("factor", "share"), [(1 / 3, (1, 3)), (0.333333333333, (1, 3)), (1e-9, (1, 10_000))])
def test_factors_are_read_as_they_were_meant(factor: float, share: tuple[int, int]) -> None:
    assert choice_share(4, factor) == share
