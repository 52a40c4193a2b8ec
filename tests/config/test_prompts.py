"""Prompts of any length and any id are read as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared_config.contract.decoding import SamplingConfig, read_prompts
from shared_config.errors import UserError


def test_long_prompts_and_large_ids_are_kept() -> None:
    rows = [np.arange(70_000, dtype=np.int64), np.array([99_999])]
    prompts = read_prompts(rows, None, 100_000)
    assert prompts.lengths.tolist() == [70_000, 1]
    assert prompts.tokens.shape == (2, 70_000)
    np.testing.assert_array_equal(prompts.tokens[0], rows[0])
    assert prompts.tokens[1].tolist() == [99_999] + [0] * 69_999


def test_lengths_cut_prompts() -> None:
    prompts = read_prompts([[5, 6, 7], [8, 9, 1]], np.array([1, 3]), 10)
    assert (prompts.tokens.tolist(), prompts.lengths.tolist()) == ([[5, 0, 0], [8, 9, 1]], [1, 3])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be at least 0"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1: must be an integer of at least 0"),
        ({"top_k": 1.5}, "top_k = 1.5"),
        ({"top_p": 0}, "top_p = 0: must be in"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"pad_token_id": 2**31}, "pad_token_id = 2147483648"),
        ({"eos_token_id": 1.0}, "eos_token_id = 1.0: must be an id"),
        ({"eos_token_id": [[1]]}, "eos_token_id"),
    ],
)
def test_values_without_meaning_are_refused_where_a_config_is_made(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named.replace("[", r"\[")):
        SamplingConfig(**values)


@pytest.mark.parametrize(
    ("given", "ids"),
    [(None, ()), (3, (3,)), ([3, 5, 3], (3, 5)), (np.array([3, 5]), (3, 5)), (np.int32(3), (3,)), ((), ())],
)
def test_one_id_or_several_end_a_row(given: Any, ids: tuple[int, ...]) -> None:
    assert SamplingConfig(eos_token_id=given).eos_token_ids == ids
