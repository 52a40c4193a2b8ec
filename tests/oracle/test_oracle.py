"""The specification says what it should: hand-worked cases and properties of each component."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.contract.rope import rope_tables
from shared_config.contract.schedule import learning_rate as shared_learning_rate
from shared_config.schema.model import ModelConfig, RopeScaling
from tests.oracle.attention import attention, masked_softmax
from tests.oracle.embedding import token_embedding
from tests.oracle.generate import generate, kept_distribution, sample
from tests.oracle.loss import cross_entropy
from tests.oracle.mlp import gelu, gelu_tanh, mlp, quick_gelu, relu, sigmoid, silu
from tests.oracle.moe import MoEOptions, capacity, find_room, gradient_factors, moe
from tests.oracle.norm import layer_norm, norm, rms_norm
from tests.oracle.optimizer import adamw_step, clip, global_norm, initial_state, learning_rate
from tests.oracle.position import apply_rope, rope_at
from tests.oracle.router import (
    balance_loss,
    expert_bias_rate,
    expert_bias_update,
    sigmoid_topk,
    softmax,
    softmax_topk,
    top_k_lowest_first,
    z_loss,
)
from tests.oracle.transformer import transformer
from tests.oracle.weights import draw, draw_weights
from tests.tolerance import assert_all_same_function, assert_same_function

CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=72, max_seq_len=32
)
MOE = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_shared_experts=2, moe_frequency=2)
SIGMOID = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_router="sigmoid_topk")
HEADS: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 61, (2, 16))
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
    together, after = attention(new_BSD, weights, ROPE, **HEADS, cache=saved.keys.cut(lengths))
    for row, length in enumerate(lengths):
        alone = np.concatenate([X_BSD[row : row + 1, :length], new_BSD[row : row + 1]], axis=1)
        expected, _ = attention(alone, weights, ROPE, **HEADS)
        assert_same_function(together[row], expected[0, length:], f"row {row}")
    np.testing.assert_array_equal(after.keys.lengths_B, lengths + 3)


# Routers and experts

X_TD = RNG.standard_normal((30, 48))
GATE = draw({"gate.weight": (5, 48), "expert_bias": (5,)}, seed=3)


def test_top_k_takes_the_lowest_index_of_equals():
    scores = np.array([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(top_k_lowest_first(scores, 3), [[1, 2, 4], [0, 1, 2]])
    many = np.tile([1.0, 2.0, 0.0], 40)
    np.testing.assert_array_equal(top_k_lowest_first(many, 60), [*range(1, 120, 3), *range(0, 60, 3)])


def test_softmax_router_by_hand():
    weights = {"gate.weight": np.log(np.array([[1.0], [5.0], [3.0], [1.0]]))}
    routing = softmax_topk(np.array([[1.0]]), weights, top_k=2)
    np.testing.assert_array_equal(routing.indices_Tk, [[1, 2]])
    np.testing.assert_allclose(routing.weights_Tk, [[5 / 8, 3 / 8]])
    assert routing.aux_loss == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.3))
    assert routing.z_loss == pytest.approx(math.log(10) ** 2)
    plain = softmax_topk(np.array([[1.0]]), weights, top_k=2, normalise=False, scaling=2.0)
    np.testing.assert_allclose(plain.weights_Tk, [[1.0, 0.6]])


def test_sigmoid_router_by_hand():
    weights = {"gate.weight": np.array([[0.0], [math.log(3)], [math.log(4)]]), "expert_bias": np.array([1.0, 0.0, 0.0])}
    routing = sigmoid_topk(np.array([[1.0]]), weights, top_k=2, scaling=2.5, sequence_aux_loss_weight=0.5)
    np.testing.assert_array_equal(routing.indices_Tk, [[0, 2]])
    np.testing.assert_allclose(routing.weights_Tk, [[2.5 * 0.5 / 1.3, 2.5 * 0.8 / 1.3]])
    assert routing.aux_loss == pytest.approx(0.5 * 3 * (0.5 * 0.5 + 0.5 * 0.8) / 2.05)
    unscaled = sigmoid_topk(np.array([[1.0]]), weights, top_k=2, normalise=False)
    np.testing.assert_allclose(unscaled.weights_Tk, [[0.5, 0.8]])
    assert unscaled.aux_loss == 0.0


def test_a_constant_added_to_every_bias_changes_nothing():
    shifted = {**GATE, "expert_bias": GATE["expert_bias"] + 0.25}
    one, other = (sigmoid_topk(X_TD, weights, top_k=2) for weights in (GATE, shifted))
    np.testing.assert_array_equal(one.indices_Tk, other.indices_Tk)
    np.testing.assert_array_equal(one.weights_Tk, other.weights_Tk)
    uneven = {**GATE, "expert_bias": np.array([1.0, 0, 0, 0, 0])}
    assert (sigmoid_topk(X_TD, uneven, top_k=2).indices_Tk[:, 0] == 0).all()


@pytest.mark.parametrize("router", [softmax_topk, sigmoid_topk])
def test_padding_counts_nowhere(router):
    valid = np.arange(30) % 3 > 0
    options: dict[str, Any] = {"sequence_aux_loss_weight": 1.0} if router is sigmoid_topk else {}
    whole, part = router(X_TD, GATE, top_k=2, valid_T=valid, **options), router(X_TD[valid], GATE, top_k=2, **options)
    np.testing.assert_array_equal(whole.counts_E, part.counts_E)
    assert whole.aux_loss == pytest.approx(part.aux_loss, rel=1e-14)
    assert whole.z_loss == pytest.approx(part.z_loss, rel=1e-14)
    nothing = router(X_TD, GATE, top_k=2, valid_T=np.zeros(30, dtype=bool), **options)
    assert (nothing.aux_loss, nothing.z_loss, nothing.counts_E.sum()) == (0.0, 0.0, 0)


def test_sequence_loss_is_the_mean_over_sequences_with_tokens():
    sequences = np.repeat([0, 1, 2], 10)
    valid = sequences != 1
    whole = sigmoid_topk(X_TD, GATE, top_k=2, valid_T=valid, sequences_T=sequences, sequence_aux_loss_weight=2.0)
    each = [sigmoid_topk(X_TD[sequences == s], GATE, top_k=2, sequence_aux_loss_weight=2.0).aux_loss for s in (0, 2)]
    assert whole.aux_loss == pytest.approx(np.mean(each), rel=1e-14)


def test_balanced_routes_have_loss_one_and_a_collapsed_one_has_the_number_of_experts():
    assert balance_loss(np.full((4, 4), 0.25), np.arange(4)[:, None]) == pytest.approx(1.0)
    assert balance_loss(np.eye(4)[[2, 2, 2]], np.full((3, 1), 2)) == pytest.approx(4.0)
    np.testing.assert_array_equal(softmax(np.array([1000.0, 1000.0])), [0.5, 0.5])
    assert z_loss(np.full((2, 3), 800.0)) == pytest.approx((800 + math.log(3)) ** 2)


def test_bias_update_by_hand():
    bias, ema = expert_bias_update(np.zeros(2), np.array([0.5, 0.5]), np.array([30, 10]), rate=0.1, decay=0.9)
    np.testing.assert_allclose(ema, [0.525, 0.475])
    np.testing.assert_allclose(bias, [-0.0025, 0.0025])
    unchanged = expert_bias_update(bias, ema, np.array([0, 0]), rate=0.1)
    np.testing.assert_array_equal(unchanged, (bias, ema))


def test_bias_rates():
    steps = (0, 5, 50, 100, 200)
    rates = {name: [expert_bias_rate(2.0, name, step, 100) for step in steps] for name in SCHEDULES}
    np.testing.assert_allclose(rates["constant"], [2, 2, 2, 2, 2])
    np.testing.assert_allclose(rates["cosine_decay"], [2, 1 + math.cos(math.pi * 0.05), 1, 0, 0], atol=1e-15)
    np.testing.assert_allclose(rates["linear_warmup"], [0, 1, 2, 2, 2])


SCHEDULES = ("constant", "cosine_decay", "linear_warmup")


def test_capacity_is_exact_on_decimal_factors():
    assert capacity(10, 1, 1, 1.1) == 11
    assert math.ceil(10 * 1.1) == 11
    assert capacity(100, 1, 1, 1.1) == 110
    assert math.ceil(100 * 1.1) == 111
    assert capacity(7, 2, 4, 1.0) == 4
    assert capacity(1, 1, 100, 0.01) == 1
    assert capacity(5, 2, 4, 0.0) is None


def test_first_choices_are_seated_before_second_ones_and_tokens_in_order():
    indices = np.array([[0, 1], [0, 1], [1, 0], [0, 2]])
    everyone = np.ones(4, dtype=bool)
    np.testing.assert_array_equal(
        find_room(indices, everyone, 3, 2), [[True, True], [True, False], [True, False], [False, True]]
    )
    np.testing.assert_array_equal(
        find_room(indices, np.array([False, True, True, True]), 3, 2),
        [[False, False], [True, True], [True, False], [True, True]],
    )


def moe_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    start = "layers.1.mlp."
    weights = draw_weights(config, seed=7)
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def test_experts_are_a_weighted_sum_over_tokens():
    weights, options = moe_weights(MOE), MoEOptions(top_k=2)
    y, saved = moe(X_BSD, weights, options)
    b, s = 1, 4
    logits = weights["router.gate.weight"] @ X_BSD[b, s]
    best = np.argsort(-logits)[:2]
    share = np.exp(logits[best]) / np.exp(logits[best]).sum()
    expected = sum(w * one_mlp(X_BSD[b, s], weights, f"experts.{e}") for w, e in zip(share, best, strict=True))
    assert_same_function(y[b, s], expected + one_mlp(X_BSD[b, s], weights, "shared_expert"), "one token")
    assert saved.dropped == 0


def one_mlp(x: np.ndarray, weights: dict[str, np.ndarray], path: str) -> np.ndarray:
    gate, up, down = (weights[f"{path}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def test_overflow_adds_nothing_and_is_counted():
    weights, tight = moe_weights(MOE), MoEOptions(top_k=2, capacity_factor=0.1)
    y, saved = moe(X_BSD, weights, tight)
    assert saved.routing.counts_E.sum() == 36
    assert (np.bincount(saved.routing.indices_Tk[saved.kept_Tk], minlength=5) <= 1).all()
    assert saved.dropped == 36 - saved.kept_Tk.sum() > 0
    untouched = ~saved.kept_Tk.any(axis=1)
    shared = np.stack([one_mlp(x, weights, "shared_expert") for x in X_BSD.reshape(18, 48)])
    assert_same_function(y.reshape(18, 48)[untouched], shared[untouched], "dropped")


def test_padding_tokens_get_the_shared_expert_only():
    weights = moe_weights(MOE)
    valid = np.ones((2, 9), dtype=bool)
    valid[0, 5] = False
    y, saved = moe(X_BSD, weights, MoEOptions(top_k=2), valid)
    assert_same_function(y[0, 5], one_mlp(X_BSD[0, 5], weights, "shared_expert"), "padding")
    assert saved.routing.counts_E.sum() == 34
    assert saved.dropped == 0


def test_packed_experts_are_the_same_function():
    weights = moe_weights(MOE)
    packed = {name: value for name, value in weights.items() if not name.startswith("experts")}
    for name in ("gate", "up", "down"):
        packed[f"{name}_w"] = np.stack([weights[f"experts.{e}.{name}_proj.weight"].T for e in range(5)])
    options = MoEOptions(top_k=2)
    assert_same_function(moe(X_BSD, packed, options)[0], moe(X_BSD, weights, options)[0], "packed")


def test_gradient_scale_leaves_the_output_and_evens_the_factors():
    weights, plain = moe_weights(MOE), MoEOptions(top_k=2)
    scaled = dataclasses.replace(plain, gradient_scale=True)
    np.testing.assert_array_equal(moe(X_BSD, weights, plain)[0], moe(X_BSD, weights, scaled)[0])
    np.testing.assert_allclose(gradient_factors(np.array([1, 3, 0, 8])), [3, 1, 1, 3 / 8])


# Loss and optimiser


def test_cross_entropy_by_hand():
    logits = np.log(np.array([[[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]]))
    assert cross_entropy(logits, np.array([[0, -100, 1]])) == pytest.approx((math.log(4) + math.log(10)) / 2)
    assert cross_entropy(logits, np.full((1, 3), -100)) == 0.0


def test_adamw_by_hand():
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5}
    parameters = {"w": np.array([[2.0]]), "norm": np.array([2.0])}
    gradients = {"w": np.array([[4.0]]), "norm": np.array([4.0])}
    state = initial_state(parameters)
    new, state = adamw_step(parameters, gradients, state, decayed=("w",), **options)
    assert new["norm"] == pytest.approx(2 - 0.1 * (4 / (4 + 1)))
    assert new["w"] == pytest.approx(2 - 0.1 * (4 / (4 + 1) + 1))
    new, state = adamw_step(new, {name: -g for name, g in gradients.items()}, state, decayed=("w",), **options)
    assert (state.m["norm"], state.v["norm"], state.steps) == (-1.0, 7.0, 2)
    assert new["norm"] == pytest.approx(1.92 - 0.1 * (-1 / 0.75) / (math.sqrt(7 / 0.4375) + 1))


def test_clip_shortens_to_the_norm_and_leaves_what_is_shorter():
    gradients = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert global_norm(gradients) == 5.0
    assert global_norm(clip(gradients, 1.0)) == pytest.approx(1.0)
    assert clip(gradients, 1.0)["a"] == pytest.approx(0.6)
    np.testing.assert_array_equal(clip(gradients, 5.0)["b"], gradients["b"])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_learning_rate_agrees_with_the_shared_schedule(name: str):
    schedule: dict[str, Any] = {"lr": 2.0, "warmup_steps": 4, "decay_steps": 12, "min_lr_ratio": 0.25}
    got = [learning_rate(step, name=name, **schedule) for step in range(15)]
    np.testing.assert_allclose(got[:4], [0.5, 1.0, 1.5, 2.0])
    middle = {"cosine": 1.25, "linear": 1.25, "constant": 2.0}[name]
    np.testing.assert_allclose(got[8], middle)
    np.testing.assert_allclose(got[12:], 2.0 if name == "constant" else 0.5)
    shared = [
        shared_learning_rate(step, peak=2.0, warmup_steps=4, decay_steps=12, min_ratio=0.25, kind=name)
        for step in range(15)
    ]
    np.testing.assert_allclose(shared, got, rtol=1e-14)


# The whole model


@pytest.mark.parametrize("config", [CONFIG, MOE, SIGMOID, CONFIG.replace(tie_embeddings=True, norm_type="layernorm")])
def test_weights_are_those_of_the_parameter_table(config: ModelConfig):
    shapes = {name: value.shape for name, value in draw_weights(config).items()}
    assert shapes == {name: spec.shape for name, spec in parameter_table(config).items()}


def test_drawn_weights_hide_nothing():
    weights = draw_weights(CONFIG.replace(norm_type="layernorm", attention_bias=True, qk_norm=True))
    assert all((value != 0).all() for value in weights.values())
    assert weights["norm.weight"].std() > 0.2
    matrix = weights["layers.0.mlp.gate_proj.weight"]
    assert matrix.std() == pytest.approx(48**-0.5, rel=0.05)


def test_forward_names_every_module_and_takes_little_time():
    weights = draw_weights(MOE)
    transformer(weights, MOE, TOKENS)
    start = time.perf_counter()
    out = transformer(weights, MOE, TOKENS)
    assert time.perf_counter() - start < 0.1
    assert out.logits.shape == (2, 16, 61)
    for name in (
        "token_embedding",
        "layers.0.attention_norm",
        "layers.0.attention.q_proj",
        "layers.0.attention.o_proj",
        "layers.0.attention",
        "layers.0.mlp_norm",
        "layers.0.mlp.gate_proj",
        "layers.1.mlp.router",
        "layers.1.mlp.shared_expert",
        "layers.1.mlp",
        "layers.1",
        "norm",
        "output_head",
    ):
        assert name in out.activations
    assert list(out.expert_counts) == [1]
    assert out.expert_counts[1].sum() == 2 * 16 * 2


def test_residual_stream_is_the_sum_of_its_parts():
    a = transformer(draw_weights(CONFIG), CONFIG, TOKENS).activations
    middle = a["token_embedding"] + a["layers.0.attention"]
    assert_same_function(a["layers.0"], middle + a["layers.0.mlp"], "layers.0")


@pytest.mark.parametrize("config", [CONFIG, MOE, SIGMOID], ids=["dense", "softmax", "sigmoid"])
def test_cached_decode_equals_the_whole(config: ModelConfig):
    weights = draw_weights(config)
    whole = transformer(weights, config, TOKENS).logits
    caches, parts = None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, 16)):
        out = transformer(weights, config, TOKENS[:, part], caches=caches)
        caches = out.caches
        parts.append(out.logits)
    assert_same_function(np.concatenate(parts, axis=1), whole, "logits")


def test_embeddings_may_be_given_or_put_in_front():
    weights = draw_weights(CONFIG)
    table = weights["token_embedding.embedding.weight"]
    whole = transformer(weights, CONFIG, TOKENS).logits
    embedded = transformer(weights, CONFIG, inputs_embeds=table[TOKENS]).logits
    np.testing.assert_array_equal(embedded, whole)
    prefix = table[TOKENS[:, :6]]
    sliced = transformer(weights, CONFIG, TOKENS[:, 6:], prefix_embeds=prefix, output_slice=slice(6, None)).logits
    assert_same_function(sliced, whole[:, 6:], "prefix")
    with pytest.raises(ValueError, match="exactly one"):
        transformer(weights, CONFIG)
    with pytest.raises(ValueError, match="exactly one"):
        transformer(weights, CONFIG, TOKENS, inputs_embeds=table[TOKENS])


def test_tied_embeddings_read_the_table():
    tied = CONFIG.replace(tie_embeddings=True)
    weights = draw_weights(tied)
    untied = {**weights, "output_head.proj.weight": weights["token_embedding.embedding.weight"]}
    np.testing.assert_array_equal(transformer(weights, tied, TOKENS).logits, transformer(untied, CONFIG, TOKENS).logits)


def test_positions_past_the_end_are_refused():
    weights = draw_weights(CONFIG)
    tokens = np.zeros((1, 33), dtype=np.int64)
    with pytest.raises(ValueError, match="sequence length = 33: must be at most max_seq_len = 32"):
        transformer(weights, CONFIG, tokens)
    caches = transformer(weights, CONFIG, tokens[:, :32]).caches
    with pytest.raises(ValueError, match="max_seq_len"):
        transformer(weights, CONFIG, tokens[:, :1], caches=caches)


# Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.1, 0.4]))


def test_greedy_and_ties():
    assert sample(LOGITS, 0.99, temperature=0) == 1
    assert sample(LOGITS, 0.99, top_k=1) == 1
    np.testing.assert_array_equal(kept_distribution(LOGITS, top_k=3)[0], [1, 3, 0])


def test_inverse_cdf_over_falling_probability():
    uniforms = [0.0, 0.39, 0.41, 0.79, 0.81, 0.89, 0.91, 1 - 2**-53]
    assert [sample(LOGITS, u) for u in uniforms] == [1, 1, 3, 3, 0, 0, 2, 2]


def test_top_p_keeps_the_token_that_crosses():
    np.testing.assert_array_equal(kept_distribution(LOGITS, top_p=0.3)[0], [1])
    np.testing.assert_array_equal(kept_distribution(LOGITS, top_p=0.5)[0], [1, 3])
    np.testing.assert_allclose(kept_distribution(LOGITS, top_p=0.85)[1], [0.4 / 0.9, 0.4 / 0.9, 0.1 / 0.9])
    np.testing.assert_array_equal(kept_distribution(LOGITS, top_k=2, top_p=0.45)[0], [1])


def test_temperature_sharpens():
    np.testing.assert_allclose(kept_distribution(LOGITS, temperature=0.5)[1], np.array([16, 16, 1, 1]) / 34)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_options_are_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sample(LOGITS, **bad)  # type: ignore[arg-type]


def test_generation_is_greedy_by_row_and_pads_after_eos():
    weights = draw_weights(CONFIG)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    new = generate(weights, CONFIG, prompts, 6)
    seen = prompts[0] + list(new[0, :5])
    assert new[0, 5] == np.argmax(transformer(weights, CONFIG, np.array([seen])).logits[0, -1])
    np.testing.assert_array_equal(generate(weights, CONFIG, prompts[1:], 6), new[1:])
    stopped = generate(weights, CONFIG, prompts, 6, eos_token_id=int(new[0, 2]), pad_token_id=60)
    end = list(new[0]).index(new[0, 2]) + 1
    np.testing.assert_array_equal(stopped[0], [*new[0, :end], *[60] * (6 - end)])
    drawn = generate(weights, CONFIG, prompts, 6, temperature=1.0, uniforms=np.full((2, 6), 0.9))
    assert (drawn != new).any()
