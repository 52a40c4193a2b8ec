"""The kernel of moments against the host's own: on a GPU,

python -m pytest -n 0 -m gpu tests/torch/test_moments_kernel.py

or, where Triton is installed without one, by its interpreter: TRITON_INTERPRET=1 python -m pytest -n 0 with this file.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kempnerforge_torch.model.state import from_numpy
from kempnerforge_torch.moments_kernel import AT_A_TIME, MOST_GROUPS, run_moments
from shared_config.parity import summaries
from shared_config.parity.summaries import PIECE, SKETCH_SIZE
from tests.parity.test_statistics import assert_same_moments, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
SIZES = (1, SKETCH_SIZE - 1, SKETCH_SIZE, SKETCH_SIZE + 1, AT_A_TIME * SKETCH_SIZE + 1, PIECE, PIECE + 1)
LARGE = (2 * PIECE + 1500, MOST_GROUPS * AT_A_TIME * SKETCH_SIZE, 9 * MOST_GROUPS * SKETCH_SIZE + 7)
DTYPES = ("float32", "float16", ml_dtypes.bfloat16)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.* encountered in (multiply|add):RuntimeWarning"),  # of the interpreter
]


def found(values: np.ndarray, pieces: int | None = None) -> np.ndarray:
    """By the kernel."""
    signs = torch.from_numpy(summaries.signs(np.int8)).to(DEVICE)
    first, times = summaries.starts(pieces or -(-values.size // PIECE))
    flat = from_numpy(values).to(DEVICE)
    return (
        run_moments(flat, signs, torch.from_numpy(first).to(DEVICE), torch.from_numpy(times).to(DEVICE)).cpu().numpy()
    )


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from(SIZES), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), gaps=st.booleans(),
    more=st.integers(0, 9), factor=st.sampled_from([1.0, 1e-19, 1e19, 1e30]),
)  # fmt: skip
def test_moments_are_those_of_the_host(size: int, dtype: Any, seed: int, gaps: bool, more: int, factor: float) -> None:
    """Some with squares that 32 bits don't hold."""
    values = drawn(size, "float32", seed, gaps) * np.float32(1.0 if dtype == "float16" else factor)
    values = values.astype(dtype)
    assert_same_moments(found(values, -(-size // PIECE) + more), summaries.moments(values), dtype)


@pytest.mark.parametrize("size", LARGE[: 1 if INTERPRETED else None])
@pytest.mark.parametrize("gaps", [False, True])
def test_moments_of_many_rows(size: int, gaps: bool) -> None:
    values = drawn(size, "float32", size % 97, gaps)
    assert_same_moments(found(values), summaries.moments(values), "float32")


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3e38, -3e38, np.nan, np.inf, -np.inf])
def test_one_value_everywhere(value: float) -> None:
    values = np.full(3 * SKETCH_SIZE + 5, value, np.float32)
    assert_same_moments(found(values), summaries.moments(values), "float32")
