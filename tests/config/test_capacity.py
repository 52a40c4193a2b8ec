"""How many tokens an expert chooses: exact ceilings, whatever the numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared_config.contract import capacity as contract
from shared_config.contract.capacity import capacity_share, choice_capacity, choice_share, token_capacities
from tests.oracle.moe import capacity


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


@given(st.integers(0, 300), st.integers(1, 8), st.integers(1, 64), st.sampled_from([1e-30, 0.07, 0.1, 1.1, 1.25, 1e30]))
def test_a_table_of_capacities_holds_those_of_each_number_of_tokens(
    most: int, top_k: int, experts: int, factor: float
) -> None:
    """More than there are tokens is as many as there are, so that 32 bits hold it."""
    share = capacity_share(factor)
    assert share is not None
    table = token_capacities(most, top_k, experts, share)
    exact = [capacity(tokens, top_k, experts, factor) for tokens in range(most + 1)]
    assert table.dtype == np.int32
    assert table.tolist() == [min(room or 0, max(most, 1)) for room in exact]


@given(tokens=st.integers(0, 10**6), top_k=st.integers(1, 8), experts=st.integers(1, 256))
@example(tokens=3, top_k=1, experts=2)
def test_the_capacity_of_a_layer_is_exact(tokens: int, top_k: int, experts: int) -> None:
    assert contract.capacity_share(0.0) is None
    assert contract.capacity(tokens, top_k, experts, None) is None
    for factor in (0.1, 0.7, 1.0, 1.1, 1.25, 1e-9):
        assert contract.capacity(tokens, top_k, experts, contract.capacity_share(factor)) == capacity(
            tokens, top_k, experts, factor
        )
