"""One custom layer, twice: Hypothesis draws sizes, documents and weights, and the machine plants bugs."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.parity import assert_same_function, mutate, nest
from shared_config.parity import strategies as draw
from tests.examples.layer_in_jax import gated_attention
from tests.examples.layer_in_torch import GatedAttention

NIGHTLY = settings.get_current_profile_name() == "nightly"
SIZES = ((6, 2, 4), (10, 3, 6))
"""Width, heads and head size: few, so that JAX compiles few programs."""


def check(sizes: tuple[int, int, int], dtypes: tuple[str, ...], seed: int, documents: np.ndarray) -> None:
    dim, heads, head_dim = sizes
    model = GatedAttention(dim, heads, head_dim)
    table = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = {name: draw.weight(name, shape, seed) for name, shape in table.items()}
    x = draw.weight("x", (*documents.shape, dim), seed)
    port = functools.partial(gated_attention, heads=heads)
    assert_same_function(model, port, (x, documents), weights=weights, dtypes=dtypes)


@settings(max_examples=20 if NIGHTLY else 1)
@given(sizes=st.sampled_from(SIZES), dtype=draw.dtypes(), seed=draw.seeds(), documents=draw.documents(2, 8))
def test_both_are_the_same_layer(sizes: tuple[int, int, int], dtype: str, seed: int, documents: np.ndarray) -> None:
    check(sizes, (dtype,), seed, documents)


def test_the_test_finds_bugs_that_a_machine_plants() -> None:
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]], np.int32)
    score = mutate(
        GatedAttention.forward, lambda: check(SIZES[0], ("float64",), 3, documents), sample=30 if NIGHTLY else 2, seed=1
    )
    assert score.share >= 0.8, score.survivors
    assert nest({"layers.0.w": 1, "layers.1.w": 2}) == {"layers": [{"w": 1}, {"w": 2}]}
