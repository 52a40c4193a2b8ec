"""A kernel against its reference: attention of PyTorch, at lengths around the edges of its blocks."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.parity import DifferentError, assert_same_function
from shared_config.parity import strategies as draw
from tests.examples.kernels import attention

TORCH_AND_NUMPY = ("torch", "numpy")


@settings(max_examples=100 if settings.get_current_profile_name() == "nightly" else 4)
@given(data=st.data(), length=draw.lengths(edges=True), dtype=draw.dtypes(), causal=st.booleans())
def test_attention_is_its_formula(data: st.DataObject, length: int, dtype: str, causal: bool) -> None:
    q, k, v = (data.draw(draw.arrays((1, 2, length, 6))) for _ in range(3))
    inputs = {"query": q, "key": k, "value": v, "is_causal": causal}

    def reference(query, key, value, is_causal):
        return attention(query, key, value, is_causal)

    assert_same_function(F.scaled_dot_product_attention, reference, inputs, frameworks=TORCH_AND_NUMPY, dtypes=(dtype,))


def test_another_mask_is_found() -> None:
    q = draw.weight("q", (1, 2, 9, 6), 0)
    with pytest.raises(DifferentError, match="not the same function"):
        assert_same_function(
            lambda q, causal: F.scaled_dot_product_attention(q, q, q, is_causal=causal),
            lambda q, causal: attention(q, q, q, is_causal=not causal),
            (q, True), frameworks=TORCH_AND_NUMPY, dtypes=("bfloat16",),
        )  # fmt: skip
