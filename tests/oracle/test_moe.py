"""Routers and experts: hand-worked cases and properties."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from shared_config.schema.model import ModelConfig
from tests.oracle.moe import MoEOptions, capacity, find_room, gradient_factors, moe
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
from tests.oracle.weights import draw, draw_weights
from tests.tolerance import assert_same_function

CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=72, max_seq_len=32
)
MOE = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_shared_experts=2, moe_frequency=2)
RNG = np.random.default_rng(0)
X_BSD = RNG.standard_normal((2, 9, 48))


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
