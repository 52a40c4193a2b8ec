"""The hand-written backward passes against complex steps, and both kinds of difference against known derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from shared_config.schema.model import ModelConfig
from tests.oracle.attention import attention, attention_backward
from tests.oracle.gradient import (
    along,
    central_difference,
    directional_derivative,
    full_gradient,
    gradient_errors,
    random_direction,
)
from tests.oracle.linear import submodule
from tests.oracle.loss import cross_entropy, cross_entropy_backward
from tests.oracle.mlp import ACTIVATIONS, GATES, SLOPES, mlp, mlp_backward
from tests.oracle.moe import MoEOptions, gradient_factors, moe, moe_backward
from tests.oracle.norm import norm, norm_backward
from tests.oracle.optimizer import initial_state
from tests.oracle.position import rope_at
from tests.oracle.training import StepOptions, loss_and_gradients, parameters, training_loss, training_step
from tests.oracle.weights import draw, draw_weights
from tests.tolerance import assert_same_function

LIMIT = 2e-14
CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=72, max_seq_len=32
)
EXPERTS = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_router_z_loss_weight=0.1)
CONFIGS = {
    "plain": CONFIG,
    "all_dense": CONFIG.replace(
        norm_type="layernorm",
        attention_bias=True,
        qk_norm=True,
        activation="gelu",
        tie_embeddings=True,
        sliding_window=5,
        n_kv_heads=1,
    ),
    "relu": CONFIG.replace(activation="relu", n_kv_heads=4),
    "softmax": EXPERTS.replace(moe_shared_experts=2, moe_frequency=2, moe_capacity_factor=1.0),
    "sigmoid": EXPERTS.replace(
        moe_router="sigmoid_topk",
        moe_packed_experts=True,
        moe_sequence_aux_loss_weight=0.3,
        moe_routed_scaling=2.5,
        moe_norm_topk_prob=False,
    ),
    "packed_gelu": EXPERTS.replace(activation="gelu", moe_packed_experts=True, moe_norm_topk_prob=False),
}
RNG = np.random.default_rng(0)
TOKENS, LABELS = RNG.integers(0, 61, (2, 2, 16))
LABELS[0, :3] = -100
REAL = np.ones((2, 16), dtype=bool)
REAL[1, :5] = False
MASKS: dict[str, Any] = {"key_padding_mask": REAL, "doc_ids": np.repeat(np.arange(4), 4)[None].repeat(2, axis=0)}
X_BSD = RNG.standard_normal((2, 9, 48))
DY_BSD = RNG.standard_normal((2, 9, 48))


def assert_derivative(function: Any, weights: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
    errors = gradient_errors(function, weights, gradients, np.random.default_rng(1))
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("norm_type", ["rmsnorm", "rmsnorm_1p", "layernorm"])
def test_norm(norm_type: str):
    weights = {"x": X_BSD, **draw({"weight": (48,), "bias": (48,)})}
    dx, gradients = norm_backward(DY_BSD, X_BSD, weights, norm_type, 0.1)
    assert_derivative(lambda w: np.sum(norm(w["x"], w, norm_type, 0.1) * DY_BSD), weights, {"x": dx, **gradients})


@pytest.mark.parametrize("name", sorted(SLOPES))
def test_activation_slopes(name: str):
    x = np.linspace(-6, 6, 50)
    exact = directional_derivative(lambda w: ACTIVATIONS[name](w["x"]), {"x": x}, {"x": np.ones(50)})
    np.testing.assert_allclose(SLOPES[name](x), exact, rtol=1e-12)


@pytest.mark.parametrize("activation", sorted({*SLOPES, *GATES}))
def test_mlp(activation: str):
    shapes = {"gate_proj.weight": (30, 48), "up_proj.weight": (30, 48), "down_proj.weight": (48, 30)}
    weights = {"x": X_BSD, **draw(shapes)}
    _, saved = mlp(X_BSD, weights, activation)
    dx, gradients = mlp_backward(DY_BSD, X_BSD, saved, weights, activation)
    assert ("gate_proj.weight" in gradients) == (activation in ("silu", "geglu_tanh"))
    assert_derivative(lambda w: np.sum(mlp(w["x"], w, activation)[0] * DY_BSD), weights, {"x": dx, **gradients})


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kv_heads: int):
    config = CONFIG.replace(attention_bias=True, qk_norm=True, n_kv_heads=kv_heads)
    weights = {"x": X_BSD, **submodule(draw_weights(config), "layers.0.attention")}
    rope = rope_at(np.arange(9), 10, 10000.0)
    options: dict[str, Any] = {
        "n_heads": 4,
        "n_kv_heads": kv_heads,
        "sliding_window": 4,
        "key_padding_mask": np.arange(9)[None] >= np.array([[0], [3]]),
    }
    _, saved = attention(X_BSD, weights, rope, **options)
    dx, gradients = attention_backward(DY_BSD, saved, weights)
    value = gradients.pop("k_proj.bias")
    assert_derivative(
        lambda w: np.sum(attention(w["x"], w, rope, **options)[0] * DY_BSD), weights, {"x": dx, **gradients}
    )
    exact = full_gradient(lambda w: np.sum(attention(X_BSD, w, rope, **options)[0] * DY_BSD), weights, "k_proj.bias")
    assert_same_function(value, exact, "k_proj.bias")


def test_attention_passes_nothing_through_a_row_without_keys():
    weights = submodule(draw_weights(CONFIG), "layers.0.attention")
    real = np.arange(9)[None] >= np.array([[0], [3]])
    rope = rope_at(np.arange(9), 10, 10000.0)
    _, saved = attention(X_BSD, weights, rope, n_heads=4, n_kv_heads=2, key_padding_mask=real)
    dy = np.zeros_like(DY_BSD)
    dy[1, :3] = DY_BSD[1, :3]
    dx, gradients = attention_backward(dy, saved, weights)
    assert not dx.any()
    assert not any(gradient.any() for gradient in gradients.values())


def test_attention_from_a_cache_treats_it_as_constant():
    weights = submodule(draw_weights(CONFIG), "layers.0.attention")
    rope = rope_at(np.arange(9), 10, 10000.0)
    options: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2}
    cache = attention(X_BSD[:, :5], weights, rope, **options)[1].keys
    new, dy = X_BSD[:, 5:], DY_BSD[:, 5:]
    dx, gradients = attention_backward(dy, attention(new, weights, rope, cache=cache, **options)[1], weights)
    assert_derivative(
        lambda w: np.sum(attention(w["x"], w, rope, cache=cache, **options)[0] * dy),
        {"x": new, **weights},
        {"x": dx, **gradients},
    )


def test_cross_entropy():
    logits = RNG.standard_normal((2, 16, 61)) * 3
    gradient = cross_entropy_backward(0.7, logits, LABELS)
    assert not gradient[0, :3].any()
    assert_derivative(lambda w: 0.7 * cross_entropy(w["z"], LABELS), {"z": logits}, {"z": gradient})
    assert not cross_entropy_backward(1.0, logits, np.full_like(LABELS, -100)).any()


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
@pytest.mark.parametrize("normalise", [True, False])
def test_moe_with_its_losses(router: str, normalise: bool):
    config = EXPERTS.replace(moe_router=router, moe_shared_experts=1)
    options = MoEOptions(
        top_k=2,
        router=router,
        capacity_factor=0.8,
        sequence_aux_loss_weight=0.5,
        norm_topk_prob=normalise,
        routed_scaling=1.7,
    )
    valid = np.arange(9)[None] >= np.array([[0], [3]])
    weights = {"x": X_BSD, **submodule(draw_weights(config), "layers.0.mlp")}
    _, saved = moe(X_BSD, weights, options, valid)
    assert saved.dropped > 0
    dx, gradients = moe_backward(DY_BSD, X_BSD, saved, weights, options, daux_loss=3.0, dz_loss=0.2)

    def function(w: dict[str, np.ndarray]) -> Any:
        y, saved = moe(w["x"], w, options, valid)
        return np.sum(y * DY_BSD) + 3.0 * saved.routing.aux_loss + 0.2 * saved.routing.z_loss

    assert_derivative(function, weights, {"x": dx, **gradients})


def test_gradient_scale_multiplies_each_expert():
    weights = submodule(draw_weights(EXPERTS), "layers.0.mlp")
    plain = MoEOptions(top_k=2)
    scaled = dataclasses.replace(plain, gradient_scale=True)
    _, saved = moe(X_BSD, weights, plain)
    factors = gradient_factors(saved.routing.counts_E)
    assert len(set(factors)) > 1
    _, without = moe_backward(DY_BSD, X_BSD, saved, weights, plain)
    _, with_scale = moe_backward(DY_BSD, X_BSD, saved, weights, scaled)
    for name, gradient in without.items():
        factor = factors[int(name.split(".")[1])] if name.startswith("experts") else 1.0
        assert_same_function(with_scale[name], gradient * factor, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_of_the_whole_model(name: str):
    config = CONFIGS[name]
    weights = draw_weights(config, seed=1)
    _, gradients = loss_and_gradients(weights, config, TOKENS, LABELS, **MASKS)
    assert gradients.keys() == parameters(weights).keys()
    assert_derivative(lambda w: training_loss(w, config, TOKENS, LABELS, **MASKS)[0], weights, gradients)


def test_gradients_of_given_embeddings():
    weights = {**draw_weights(CONFIG), "inputs_embeds": RNG.standard_normal((2, 16, 48))}
    _, gradients = loss_and_gradients(weights, CONFIG, None, LABELS, inputs_embeds=weights["inputs_embeds"])
    assert_derivative(
        lambda w: training_loss(w, CONFIG, None, LABELS, inputs_embeds=w["inputs_embeds"])[0], weights, gradients
    )


def test_gradients_of_prefix_and_slice():
    weights = {**draw_weights(CONFIG), "prefix_embeds": RNG.standard_normal((2, 5, 48))}
    part = slice(5, None)
    _, gradients = loss_and_gradients(
        weights, CONFIG, TOKENS, LABELS, prefix_embeds=weights["prefix_embeds"], output_slice=part
    )
    assert gradients["prefix_embeds"].shape == (2, 5, 48)
    assert_derivative(
        lambda w: training_loss(w, CONFIG, TOKENS, LABELS, prefix_embeds=w["prefix_embeds"], output_slice=part)[0],
        weights,
        gradients,
    )


def test_one_step_lowers_the_loss_and_moves_every_parameter_but_no_buffer():
    config = CONFIGS["sigmoid"]
    weights = draw_weights(config)
    state = initial_state(parameters(weights))
    options = StepOptions(lr=1e-3, max_norm=1.0)
    before, new, state = training_step(weights, state, config, TOKENS, LABELS, options, decayed=())
    after, _, _ = training_step(new, state, config, TOKENS, LABELS, options, decayed=())
    assert after < before
    assert set(state.steps.values()) == {1}
    for name, value in weights.items():
        assert (new[name] != value).any() == (name in parameters(weights))


def test_directional_derivative_is_exact_and_takes_any_output():
    weights = {"a": np.array([0.3, 2.0]), "b": np.array(5.0)}
    direction = {"a": np.array([1.0, -2.0])}
    exact = np.array([np.cos(0.3), -2 * np.cos(2.0)]) * 5
    got = directional_derivative(lambda w: np.sin(w["a"]) * w["b"], weights, direction)
    np.testing.assert_allclose(got, exact, rtol=1e-15)
    np.testing.assert_allclose(
        central_difference(lambda w: np.sin(w["a"]) * w["b"], weights, direction), exact, rtol=1e-12
    )


def test_central_difference_confirms_the_backward_at_its_accuracy():
    weights = draw_weights(CONFIG, seed=1)
    _, gradients = loss_and_gradients(weights, CONFIG, TOKENS, LABELS)
    direction = random_direction(weights, RNG)
    direction = {name: step * weights[name].std() / 10 for name, step in direction.items()}
    got = central_difference(lambda w: training_loss(w, CONFIG, TOKENS, LABELS)[0], weights, direction)
    assert got == pytest.approx(along(gradients, direction), rel=1e-9)


def test_full_gradient_of_a_whole_model_agrees_element_by_element():
    weights = draw_weights(CONFIG)
    _, gradients = loss_and_gradients(weights, CONFIG, TOKENS, LABELS)
    exact = full_gradient(lambda w: training_loss(w, CONFIG, TOKENS, LABELS)[0], weights, "layers.1.mlp_norm.weight")
    assert_same_function(gradients["layers.1.mlp_norm.weight"], exact, "layers.1.mlp_norm.weight")


@pytest.mark.parametrize(
    "name", ["layers.0.attention.k_proj.weight", "norm.weight", "token_embedding.embedding.weight"]
)
def test_a_wrong_gradient_is_noticed(name: str):
    weights = draw_weights(CONFIG)
    _, gradients = loss_and_gradients(weights, CONFIG, TOKENS, LABELS)
    gradients[name].flat[np.argmax(gradients[name])] += 1e-9 * np.linalg.norm(gradients[name])
    errors = gradient_errors(lambda w: training_loss(w, CONFIG, TOKENS, LABELS)[0], weights, gradients, RNG)
    assert errors[name] > 100 * LIMIT
    assert max(error for other, error in errors.items() if other != name) < LIMIT
