"""Loss, optimiser, the whole model and sampling: hand-worked cases and properties."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.contract.schedule import learning_rate as shared_learning_rate
from shared_config.schema.model import ModelConfig
from tests.oracle.generate import generate, kept_distribution, sample
from tests.oracle.loss import cross_entropy
from tests.oracle.optimizer import adamw_step, clip, global_norm, initial_state, learning_rate
from tests.oracle.transformer import transformer
from tests.oracle.weights import draw_weights
from tests.tolerance import assert_same_function

CONFIG = ModelConfig(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=72, max_seq_len=32
)
MOE = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_shared_experts=2, moe_frequency=2)
SIGMOID = CONFIG.replace(num_experts=5, moe_expert_ffn_multiplier=0.5, moe_router="sigmoid_topk")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 61, (2, 16))


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
    assert (state.m["norm"], state.v["norm"], state.steps["norm"]) == (-1.0, 7.0, 2)
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
