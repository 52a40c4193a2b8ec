"""Prompts of any length and any id are read as they are."""

from __future__ import annotations

import numpy as np

from shared_config.contract.decoding import read_prompts


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
