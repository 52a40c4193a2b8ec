"""Calls as the documentation of the model package has them, standing alone, in both backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from shared_config.contract.noise import image_noise
from shared_config.interchange.activations import read_activations
from shared_config.schema.model import ModelConfig
from tests.parity.backends import on_both

RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((2, 3, 4, 4))
FEATURES = RNG.standard_normal((2, 16, 12))
CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=23, max_seq_len=32, ffn_hidden_dim=24)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Encoders and adapters


@on_both
def test_a_random_encoder_is_told_its_sizes_and_a_seed(backend: Any) -> None:
    builder = backend.module("model.vision").RandomVisionEncoder
    default, encoder = (backend.build(builder, **sizes) for sizes in ({}, {"num_tokens": 5, "feature_dim": 7}))
    assert (default.num_tokens, default.feature_dim) == (16, 768)
    pixel_values = backend.array(PIXELS)
    found = backend.numpy(encoder(pixel_values=pixel_values))
    np.testing.assert_array_equal(found, image_noise(PIXELS, 5, 7))
    other = backend.numpy(backend.build(builder, num_tokens=5, feature_dim=7, seed=3)(pixel_values))
    np.testing.assert_array_equal(other, image_noise(PIXELS, 5, 7, seed=3))
    assert np.mean(found != other) > 0.9


@on_both
@pytest.mark.parametrize("kind", ["AvgPoolAdapter", "AttentionalPoolAdapter"])
def test_a_window_may_be_given_with_a_call(backend: Any, kind: str) -> None:
    builder = getattr(backend.module("model.adapter"), kind)
    heads = {"pool_heads": 3} if kind == "AttentionalPoolAdapter" else {}
    weights = backend.module("model.state").get_state(backend.build(builder, 12, 8, **heads))
    small, large = (backend.build(builder, in_dim=12, out_dim=8, pool_window=w, **heads) for w in (2, 4))
    for adapter in (small, large):
        backend.module("model.state").set_state(adapter, {name: _varied(w) for name, w in weights.items()})
    x = backend.array(FEATURES)
    assert [a.output_num_tokens(num_input_tokens=16) for a in (small, large)] == [4, 1]
    assert small(x).shape == (2, 4, 8)
    np.testing.assert_allclose(backend.numpy(small(x, pool_window=4)), backend.numpy(large(x)), rtol=1e-12)
    np.testing.assert_array_equal(backend.numpy(small(x, pool_window=None)), backend.numpy(small(x)))


@on_both
@pytest.mark.parametrize("kind", ["MLP2LayerAdapter", "LinearAdapter", "AvgPoolAdapter", "AttentionalPoolAdapter"])
def test_adapters_draw_their_weights_anew(backend: Any, kind: str) -> None:
    """As they start: weights normal(0, 1 / sqrt(inputs)), biases 0."""
    builder, state = getattr(backend.module("model.adapter"), kind), backend.module("model.state")
    rngs = _rngs(backend)
    adapter = builder(in_dim=256, out_dim=128, **rngs)
    start = {name: np.array(value) for name, value in backend.numpy(state.get_state(adapter)).items()}
    state.set_state(adapter, {name: np.full_like(value, 7) for name, value in start.items()})
    adapter.reset_parameters(**rngs)
    again = backend.numpy(state.get_state(adapter))
    for values in (start, again):
        for name, value in values.items():
            if name.endswith("bias"):
                assert (value == 0).all(), name
            else:
                assert value.std() == pytest.approx(value.shape[1] ** -0.5, rel=0.05), name
                assert abs(value.mean()) < 0.01, name
    assert all((again[name] != start[name]).any() for name in start if name.endswith("weight"))


def _varied(value: Any) -> np.ndarray:
    return np.sin(np.arange(np.prod(value.shape))).reshape(value.shape)


def _rngs(backend: Any) -> dict[str, Any]:
    return {} if backend.name == "torch" else {"rngs": nnx.Rngs(0)}


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a transformer


@on_both
def test_a_plain_transformer_has_empty_places_for_the_parts_of_others(backend: Any) -> None:
    model = backend.build(backend.module("model.transformer").Transformer, CONFIG)
    assert len(model.cross_attention_layers) == len(model.mot_norms) == 0
    assert not any("cross" in name or "mot" in name for name in backend.module("model.state").get_state(model))
    attention = backend.build(backend.module("model.cross_attention").CrossAttention, 16, 4, 2, head_dim=8)
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (4, 2, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Files


@on_both
def test_saved_activations_get_the_suffix_of_their_format(backend: Any, tmp_path: Path) -> None:
    save = backend.module("model.hooks").save_activations
    for name in ("plain", "step.10", "done.npz"):
        save({"norm": backend.array(FEATURES, "float32")}, tmp_path / name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["done.npz", "plain.npz", "step.10.npz"]
    np.testing.assert_array_equal(read_activations(tmp_path / "plain.npz")["norm"], FEATURES.astype(np.float32))
