"""What runs by day is a part of what runs by night."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import daytime

COUNTS = st.dictionaries(st.sampled_from(["a::x", "a::y", "b::z"]), st.integers(1, 40))


@given(COUNTS, st.sampled_from([1, 2, 4, math.inf]))
def test_of_each_test_its_share_runs(counts: dict[str, int], share: float) -> None:
    names = [f"{test}[{case}]" for test, count in counts.items() for case in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daytime, "SHARES", {"a::x": share})
        chosen = daytime.by_day(names)
        assert chosen == daytime.by_day(names[::-1])
        assert daytime.stale(names) == ([] if "a::x" in counts else ["a::x"])
    assert chosen <= set(names)
    for test, count in counts.items():
        own = [name for name in chosen if daytime.test_of(name) == test]
        assert len(own) == (math.ceil(count / share) if test == "a::x" else count)


def test_no_test_has_two_shares() -> None:
    assert len(daytime.SHARES) == len(daytime.HALF) + len(daytime.QUARTER) + len(daytime.NIGHT)
