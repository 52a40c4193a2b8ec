"""Norms, positions, embedding, feed-forward and attention: hand-worked cases and properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shared_config.contract.rope import rope_tables
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.oracle.attention import attention, masked_softmax
from tests.oracle.embedding import token_embedding
from tests.oracle.mlp import gelu, gelu_tanh, mlp, quick_gelu, relu, sigmoid, silu
from tests.oracle.norm import layer_norm, norm, rms_norm
from tests.oracle.position import apply_rope, rope_at
from tests.oracle.weights import draw_weights
from tests.tolerance import assert_all_same_function, assert_same_function

CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=72, max_seq_len=32
)
HEADS: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2}
RNG = np.random.default_rng(0)
X_BSD = RNG.standard_normal((2, 9, 48))
ROPE = rope_at(np.arange(32), 10, 10000.0)


def attention_weights(**changes: object) -> dict[str, np.ndarray]:
    config = CONFIG.replace(n_layers=1, **{"attention_bias": True, "qk_norm": True, **changes})
    block = draw_weights(config, seed=5)
    start = "layers.0.attention."
    return {name.removeprefix(start): value for name, value in block.items() if name.startswith(start)}


# Norms, positions, embedding, feed-forward


def test_rms_norm_by_hand():
    np.testing.assert_allclose(rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.5), [3 / 13**0.5, 8 / 13**0.5])


def test_layer_norm_by_hand():
    got = layer_norm(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([10.0, 20.0]), 3.0)
    np.testing.assert_allclose(got, [10 - 1, 20 + 1])


def test_unknown_norm_is_a_key_error():
    with pytest.raises(KeyError, match="Unknown norm: 'batch'"):
        norm(np.ones(3), {"weight": np.ones(3)}, "batch", 1e-5)


def test_rope_turns_halves_by_the_angle():
    angle = 0.3
    got = apply_rope(np.array([[1.0, 2.0, 0.0, 1.0]]), np.cos([angle, 0.0]), np.sin([angle, 0.0]))
    np.testing.assert_allclose(got, [[math.cos(angle), 2.0, math.sin(angle), 1.0]])


def test_rope_products_depend_on_the_distance_alone():
    q, k = RNG.standard_normal((2, 1, 10))
    products = [apply_rope(q, *at(p)) @ apply_rope(k, *at(p - 3)).T for p in (3, 7, 29)]
    np.testing.assert_allclose(products, [products[0]] * 3, rtol=0, atol=1e-13)


def at(position: int) -> tuple[np.ndarray, np.ndarray]:
    return rope_at(np.array([position]), 10, 10000.0)


SCALINGS = [
    None,
    RopeScaling(type="linear", factor=4.0),
    RopeScaling(type="llama3", factor=8.0, original_max_seq_len=64),
    RopeScaling(type="yarn", factor=4.0, original_max_seq_len=1024, beta_fast=20.0),
    RopeScaling(type="yarn", factor=4.0, original_max_seq_len=64, attention_factor=1.25),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.type if s else "plain")
def test_rope_agrees_with_the_shared_tables(scaling: RopeScaling | None):
    assert_all_same_function(
        dict(zip("cs", rope_tables(32, 300, 500.0, scaling), strict=True)),
        dict(zip("cs", rope_at(np.arange(300), 32, 500.0, scaling), strict=True)),
    )


def test_rope_scalings_differ_from_plain_where_they_should():
    plain = rope_at(np.array(1), 32, 500.0)
    for scaling in SCALINGS[1:]:
        scaled = rope_at(np.array(1), 32, 500.0, scaling)
        stretch = np.hypot(*scaled)
        slow_down = np.arctan2(plain[1], plain[0]) / np.arctan2(scaled[1], scaled[0])
        assert scaling is not None
        assert slow_down[-1] == pytest.approx(scaling.factor)
        assert slow_down[0] == pytest.approx(scaling.factor if scaling.type == "linear" else 1.0)
        wanted = scaling.attention_factor or (0.1 * math.log(4) + 1 if scaling.type == "yarn" else 1.0)
        np.testing.assert_allclose(stretch, wanted)


@pytest.mark.parametrize("token", [-1, 61])
def test_tokens_outside_the_vocabulary_are_refused(token: int):
    with pytest.raises(ValueError, match=f"tokens = {token}: must be in"):
        token_embedding(np.array([[0, token]]), {"embedding.weight": np.ones((61, 4))})


def test_activations_by_hand():
    x = np.array([-800.0, -1.0, 0.0, 2.0, 800.0])
    np.testing.assert_allclose(sigmoid(x), [0, 1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-2)), 1], atol=1e-300)
    np.testing.assert_allclose(silu(x)[1:4], [-1 / (1 + math.e), 0, 2 / (1 + math.exp(-2))])
    np.testing.assert_allclose(gelu(x)[1:4], [-0.15865525393145707, 0, 1.9544997361036416], rtol=1e-14)
    np.testing.assert_allclose(gelu_tanh(x)[1:4], [-0.15880800939172324, 0, 1.954597694087775], rtol=1e-14)
    np.testing.assert_allclose(quick_gelu(x)[3], 2 / (1 + math.exp(-3.404)))
    np.testing.assert_array_equal(relu(x), [0, 0, 0, 2, 800])


def test_mlp_forms_by_hand():
    x, one = np.array([[2.0]]), np.array([[1.0]])
    weights = {"gate_proj.weight": -one, "up_proj.weight": 3 * one, "down_proj.weight": 5 * one}
    assert mlp(x, weights, "silu")[0] == pytest.approx(5 * (-2 / (1 + math.exp(2))) * 6)
    assert mlp(x, weights, "relu")[0] == pytest.approx(30.0)
    assert set(mlp(x, weights, "silu")[1]) == {"gate_proj", "up_proj", "down_proj"}


# Attention


def naive_attention(
    x_BSD: np.ndarray, weights: dict[str, np.ndarray], eps: float, allowed_BST: np.ndarray
) -> np.ndarray:
    """One query of one head at a time, keys gathered into a list."""
    y = np.zeros_like(x_BSD)
    for b, s in np.ndindex(x_BSD.shape[:2]):
        merged = []
        for head in range(4):
            q = one_head(x_BSD[b, s], weights, "q", head, s, eps)
            seen = np.flatnonzero(allowed_BST[b, s]).tolist()
            if not len(seen):
                merged.append(np.zeros(10))
                continue
            keys = [one_head(x_BSD[b, t], weights, "k", head // 2, t, eps) for t in seen]
            values = [one_head(x_BSD[b, t], weights, "v", head // 2, t, eps) for t in seen]
            e = np.exp([q @ k / math.sqrt(10) for k in keys])
            merged.append(e @ np.array(values) / e.sum())
        y[b, s] = weights["o_proj.weight"] @ np.concatenate(merged) + weights["o_proj.bias"]
    return y


def one_head(
    x_D: np.ndarray, weights: dict[str, np.ndarray], kind: str, head: int, position: int, eps: float
) -> np.ndarray:
    rows = slice(10 * head, 10 * head + 10)
    vector = weights[f"{kind}_proj.weight"][rows] @ x_D + weights[f"{kind}_proj.bias"][rows]
    if kind == "v":
        return vector
    vector = vector / math.sqrt(sum(vector**2) / 10 + eps) * weights[f"{kind}_norm.weight"]
    pairs = vector[:5] + 1j * vector[5:]
    turned = pairs * np.exp(1j * position * 10000.0 ** (-np.arange(5) / 5))
    return np.concatenate([turned.real, turned.imag])


def test_attention_equals_its_formula_query_by_query():
    weights = attention_weights()
    doc_ids = np.array([[0] * 4 + [1] * 5, [7] * 9])
    real = np.ones((2, 9), dtype=bool)
    real[1, :3] = False
    got, _ = attention(
        X_BSD, weights, ROPE, **HEADS, eps=1e-2, sliding_window=4, doc_ids=doc_ids, key_padding_mask=real
    )
    allowed = np.zeros((2, 9, 9), dtype=bool)
    for b, s, t in np.ndindex(allowed.shape):
        allowed[b, s, t] = t <= s < t + 4 and doc_ids[b, s] == doc_ids[b, t] and real[b, t]
    assert not allowed[1, 0].any()
    assert_same_function(got, naive_attention(X_BSD, weights, 1e-2, allowed), "attention")


def test_a_row_without_keys_gives_zero():
    weights = attention_weights(attention_bias=False)
    real = np.ones((2, 9), dtype=bool)
    real[1, :3] = False
    got, saved = attention(X_BSD, weights, ROPE, **HEADS, key_padding_mask=real)
    assert not got[1, :3].any()
    assert not saved.probabilities_BHST[1, :, :3].any()
    np.testing.assert_allclose(saved.probabilities_BHST[1, :, 3:].sum(axis=-1), 1.0)


def test_masked_softmax_keeps_nan_and_needs_no_small_scores():
    allowed = np.array([True, True, False])
    np.testing.assert_allclose(masked_softmax(np.array([1e4, 1e4, 2e4]), allowed), [0.5, 0.5, 0.0])
    assert np.isnan(masked_softmax(np.array([np.nan, 0.0, 0.0]), allowed)[:2]).all()
    np.testing.assert_array_equal(masked_softmax(np.array([np.nan, 0.0, 0.0]), ~allowed), [0, 0, 1])
    with np.errstate(invalid="ignore"):
        assert np.isnan(masked_softmax(np.array([-np.inf, -np.inf, 0.0]), allowed)[:2]).all()


def test_documents_are_separate_sequences_up_to_a_rotation():
    weights = attention_weights()
    doc_ids = np.array([[0] * 4 + [1] * 5] * 2)
    together, _ = attention(X_BSD, weights, ROPE, **HEADS, doc_ids=doc_ids)
    apart = [attention(X_BSD[:, part], weights, ROPE, **HEADS)[0] for part in (slice(0, 4), slice(4, 9))]
    assert_same_function(together, np.concatenate(apart, axis=1), "documents")


def test_a_padded_row_is_its_real_part_up_to_a_rotation():
    weights = attention_weights()
    real = np.arange(9) >= 3
    padded, _ = attention(X_BSD, weights, ROPE, **HEADS, key_padding_mask=np.tile(real, (2, 1)))
    alone, _ = attention(X_BSD[:, 3:], weights, ROPE, **HEADS)
    assert_same_function(padded[:, 3:], alone, "padded")


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 4), (2, 7)])
@pytest.mark.parametrize("window", [None, 3])
def test_cached_chunks_equal_the_whole(chunks: tuple[int, ...], window: int | None):
    weights = attention_weights()
    doc_ids = np.array([[0] * 6 + [1] * 3, [2] * 9])
    real = np.ones((2, 9), dtype=bool)
    real[0, 2] = False
    whole, _ = attention(X_BSD, weights, ROPE, **HEADS, sliding_window=window, doc_ids=doc_ids, key_padding_mask=real)
    cache, parts, start = None, [], 0
    for size in chunks:
        part = slice(start, start + size)
        y, saved = attention(
            X_BSD[:, part],
            weights,
            ROPE,
            **HEADS,
            sliding_window=window,
            doc_ids=doc_ids[:, part],
            key_padding_mask=real[:, part],
            cache=cache,
        )
        cache, start = saved.keys, start + size
        parts.append(y)
    assert_same_function(np.concatenate(parts, axis=1), whole, "chunks")


def test_rows_of_different_lengths_continue_where_each_ends():
    weights = attention_weights()
    lengths = np.array([3, 6])
    _, saved = attention(X_BSD[:, :6], weights, ROPE, **HEADS)
    new_BSD = X_BSD[:, 6:]
    together, after = attention(new_BSD, weights, ROPE, **HEADS, cache=saved.keys.truncate(lengths))
    for row, length in enumerate(lengths):
        alone = np.concatenate([X_BSD[row : row + 1, :length], new_BSD[row : row + 1]], axis=1)
        expected, _ = attention(alone, weights, ROPE, **HEADS)
        assert_same_function(together[row], expected[0, length:], f"row {row}")
    np.testing.assert_array_equal(after.keys.lengths_B, lengths + 3)
