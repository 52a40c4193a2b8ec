"""The vision-language components: each against a simpler thing that it must equal, and their derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import TowerConfig, adapter_table, tower_table
from shared_config.schema.adapter import AdapterConfig, pooled_token_count
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.adapter import adapter, window_cells, window_means
from tests.oracle.cross_attention import cross_attention, fires_after
from tests.oracle.gradient import central_difference, directional_derivative, random_direction
from tests.oracle.linear import submodule
from tests.oracle.mlp import mlp, sigmoid
from tests.oracle.moma import expert_choice, moma_ffn, tokens_taken
from tests.oracle.mot import mot_attention, positions_within, stream
from tests.oracle.norm import norm
from tests.oracle.transformer import transformer
from tests.oracle.vision import patches, vision_tower
from tests.oracle.vlm import cross_attention_decoder, joint_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw, draw_weights
from tests.tolerance import assert_same_function

CONFIG = ModelConfig(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=61, ffn_hidden_dim=32, max_seq_len=32
)
EXPERTS = CONFIG.replace(num_experts=4, moe_expert_ffn_multiplier=0.5, moe_frequency=2)
CROSS = CrossAttentionConfig(cross_attention_every_n_layers=1, cross_attention_n_kv_heads=2)
MOT, MOMA = MoTConfig(), MoMaConfig(moma_experts_per_modality={"image": 2, "text": 3})
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 61, (2, 8))
IMAGE = RNG.standard_normal((2, 5, 24))
EMBEDS = RNG.standard_normal((2, 9, 24))
MIXED = np.array([[0, 0, 1, 0, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 1, 1, 0]])


def weights_of(config: ModelConfig, vlm: VLMConfig) -> dict[str, np.ndarray]:
    return draw({name: spec.shape for name, spec in parameter_table(config, vlm).items()}, seed=2)


# Cross-attention


def test_cross_attention_sees_every_allowed_image_token_and_no_position():
    weights = submodule(weights_of(CONFIG, CROSS), "cross_attention_layers.0.attn")
    x_BSD = RNG.standard_normal((2, 8, 24))
    heads: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2}
    whole, _ = cross_attention(x_BSD, IMAGE, weights, **heads)
    shuffled, _ = cross_attention(x_BSD, IMAGE[:, [3, 1, 4, 0, 2]], weights, **heads)
    assert_same_function(shuffled, whole, "order of image tokens")
    mask = np.array([[True, True, False, True, False], [False] * 5])
    masked, _ = cross_attention(x_BSD, IMAGE, weights, image_mask=mask, **heads)
    alone, _ = cross_attention(x_BSD[:1], IMAGE[:1, [0, 1, 3]], weights, **heads)
    assert_same_function(masked[0], alone[0], "masked")
    assert not masked[1].any()
    one, _ = cross_attention(x_BSD, IMAGE[:, :1], weights, **heads)
    value = np.repeat((IMAGE[:, 0] @ weights["v_proj.weight"].T).reshape(2, 2, 10), 2, axis=1).reshape(2, 1, 40)
    assert_same_function(one, np.broadcast_to(value @ weights["o_proj.weight"].T, one.shape), "one key")


def test_blocks_fire_after_every_nth_layer():
    vlm = CrossAttentionConfig(cross_attention_every_n_layers=3)
    assert [fires_after(layer, vlm) for layer in range(7)] == [None, None, 0, None, None, 1, None]


def test_silent_cross_attention_leaves_the_text_model():
    weights = weights_of(CONFIG, CROSS)
    for name in weights:
        if name.startswith("cross") and name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = np.zeros_like(weights[name])
    got = cross_attention_decoder(weights, CONFIG, CROSS, TOKENS, IMAGE).logits
    np.testing.assert_array_equal(got, transformer(weights, CONFIG, TOKENS).logits)
    blind = cross_attention_decoder(weights_of(CONFIG, CROSS), CONFIG, CROSS, TOKENS, image=None).logits
    np.testing.assert_array_equal(blind, got)


def test_cross_attention_heads_of_its_own():
    vlm = CROSS.replace(cross_attention_n_heads=6, cross_attention_n_kv_heads=3)
    out = cross_attention_decoder(weights_of(CONFIG, vlm), CONFIG, vlm, TOKENS, IMAGE)
    assert out.activations["cross_attention_layers.1.attn.q_proj"].shape == (2, 8, 24)
    assert out.activations["cross_attention_layers.1.attn.k_proj"].shape == (2, 5, 12)


# Joint decoder


def test_joint_decoder_puts_the_image_first():
    weights = draw_weights(CONFIG)
    table = weights["token_embedding.embedding.weight"]
    both = transformer(weights, CONFIG, inputs_embeds=np.concatenate([IMAGE, table[TOKENS]], axis=1)).logits
    assert_same_function(joint_decoder(weights, CONFIG, TOKENS, IMAGE).logits, both[:, 5:], "text")


# Mixture of transformers


def copied_from_text(config: ModelConfig, text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Both modalities with the weights of the text model."""
    copied = {}
    for name in parameter_table(config, MOT):
        source = name.replace(".image", "").replace(".text", "").replace("mot_norms", "norm")
        copied[name] = text[source.replace(".attn.", ".attention.").replace("attn_norm", "attention_norm")]
    return copied


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3, "qk_norm": True, "norm_type": "layernorm"}])
def test_mot_with_one_modality_is_the_text_model(changes: dict[str, Any]):
    config = CONFIG.replace(**changes)
    text = draw_weights(config)
    weights = copied_from_text(config, text)
    doc_ids = np.repeat([0, 1], [4, 5])[None].repeat(2, axis=0)
    real = np.ones((2, 9), dtype=bool)
    real[1, 2:4] = False
    expected = transformer(text, config, inputs_embeds=EMBEDS, doc_ids=doc_ids, key_padding_mask=real).logits
    for modality in (0, 1):
        ids = np.full((2, 9), modality)
        got = mot_decoder(weights, config, MOT, EMBEDS, ids, doc_ids=doc_ids, key_padding_mask=real).logits
        assert_same_function(got, expected, f"modality {modality}")


def test_mot_positions_count_within_a_modality():
    np.testing.assert_array_equal(positions_within(MIXED[0]), [0, 1, 0, 2, 1, 2, 3, 3, 4])


def test_mot_uses_the_weights_of_each_position_s_modality():
    weights = weights_of(CONFIG, MOT)
    before = mot_decoder(weights, CONFIG, MOT, EMBEDS, MIXED)
    moved = {name: value * 1.1 if ".mlp.image." in name else value for name, value in weights.items()}
    after = mot_decoder(moved, CONFIG.replace(n_layers=1), MOT, EMBEDS, MIXED)
    changed = (after.activations["layers.0"] != before.activations["layers.0"]).any(axis=-1)
    np.testing.assert_array_equal(changed, MIXED == 0)


def test_mot_attention_is_joint_and_causal_in_sequence_order():
    weights = submodule(weights_of(CONFIG, MOT), "layers.0.attn")
    before = mot_attention(EMBEDS, weights, CONFIG, MOT, stream(MIXED))
    moved = EMBEDS.copy()
    moved[0, 3] += 1.0
    after = mot_attention(moved, weights, CONFIG, MOT, stream(MIXED))
    changed = (after != before).any(axis=-1)
    np.testing.assert_array_equal(changed, [np.arange(9) >= 3, [False] * 9])


def test_mot_image_heads_of_their_own():
    vlm = MOT.replace(mot_image_n_kv_heads=1)
    out = mot_decoder(weights_of(CONFIG, vlm), CONFIG, vlm, EMBEDS, MIXED)
    assert np.isfinite(out.logits).all()


def index_of(modality: str) -> int:
    return MOT.mot_modalities.index(modality)


def test_mot_routers_of_both_modalities_count():
    out = mot_decoder(weights_of(EXPERTS, MOT), EXPERTS, MOT, EMBEDS, MIXED)
    assert list(out.expert_counts) == [1]
    assert out.expert_counts[1]["image"].sum() == 2 * (MIXED == 0).sum()
    assert out.expert_counts[1]["text"].sum() == 2 * (MIXED == 1).sum()
    assert out.aux_loss > 1.5
    real = np.ones((2, 9), dtype=bool)
    real[0, :2] = False
    padded = mot_decoder(weights_of(EXPERTS, MOT), EXPERTS, MOT, EMBEDS, MIXED, key_padding_mask=real)
    assert padded.expert_counts[1]["image"].sum() == 2 * ((index_of("image") == MIXED) & real).sum()


# Mixture of modality-aware experts


def test_expert_choice_by_hand():
    gate = np.array([[1.0], [-1.0]])
    one = np.array([[1.0]])
    weights = {"router.gate.weight": gate}
    for expert in range(2):
        weights |= {f"experts.{expert}.up_proj.weight": one, f"experts.{expert}.down_proj.weight": (expert + 1) * one}
    x_ND = np.array([[1.0], [3.0], [2.0]])
    y, counts = expert_choice(x_ND, weights, experts=2, capacity_factor=0.0, activation="relu")
    np.testing.assert_array_equal(counts, [2, 2])
    first, second = sigmoid(x_ND[:, 0]), sigmoid(-x_ND[:, 0])
    np.testing.assert_allclose(y[:, 0], [2 * second[0] * 1, first[1] * 3, first[2] * 2 + 2 * second[2] * 2])


def test_expert_choice_ties_go_to_the_first_token_and_noise_only_chooses():
    weights = submodule(weights_of(CONFIG, MOMA), "layers.0.mlp.experts.image")
    options: dict[str, Any] = {"experts": 2, "capacity_factor": 0.25, "activation": "silu"}
    same = np.tile(EMBEDS[0, :1], (8, 1))
    y, _ = expert_choice(same, weights, **options)
    assert [bool(row.any()) for row in y] == [True] * 2 + [False] * 6
    noise = np.zeros((8, 2))
    noise[5:7] = 100.0
    noisy, _ = expert_choice(same, weights, noise_NE=noise, **options)
    np.testing.assert_array_equal(noisy[5:7], y[:2])
    assert not noisy[:5].any()


def test_tokens_taken_are_exact():
    assert tokens_taken(7, 3, 0.0) == 3
    assert [tokens_taken(n, 3, 0.0) for n in (0, 1, 3, 6)] == [0, 1, 1, 2]
    assert tokens_taken(100, 4, 0.07) == 7
    assert int(np.ceil(100 * 0.07)) == 8


def test_moma_modalities_do_not_meet_and_padding_gets_nothing():
    weights = submodule(weights_of(CONFIG, MOMA), "layers.0.mlp")
    real = np.ones((2, 9), dtype=bool)
    real[0, 0] = real[1, 4] = False
    y, counts = moma_ffn(EMBEDS, weights, MOMA, "silu", MIXED, real)
    for index, (modality, experts) in enumerate((("image", 2), ("text", 3))):
        mine = (index == MIXED) & real
        alone, taken = expert_choice(
            EMBEDS[mine],
            submodule(weights, f"experts.{modality}"),
            experts=experts,
            capacity_factor=0.0,
            activation="silu",
        )
        np.testing.assert_array_equal(y[mine], alone)
        np.testing.assert_array_equal(counts[modality], taken)
    assert not y[~real].any()


def test_moma_without_a_modality():
    out = moma_decoder(weights_of(CONFIG, MOMA), CONFIG, MOMA, EMBEDS, np.ones((2, 9), dtype=np.int64))
    assert np.isfinite(out.logits).all()
    np.testing.assert_array_equal(out.expert_counts[0]["image"], [0, 0])


def test_moma_of_one_expert_that_takes_all_is_a_scored_mlp():
    vlm = MoMaConfig(moma_experts_per_modality={"image": 1, "text": 1})
    weights = submodule(weights_of(CONFIG, vlm), "layers.0.mlp")
    y, _ = moma_ffn(EMBEDS, weights, vlm, "silu", np.ones((2, 9), dtype=np.int64))
    own = submodule(weights, "experts.text")
    score = sigmoid(EMBEDS @ own["router.gate.weight"].T)
    assert_same_function(y, score * mlp(EMBEDS, submodule(own, "experts.0"), "silu")[0], "text")


# Adapters


@pytest.mark.parametrize(("tokens", "window"), [(9, 2), (16, 2), (25, 3), (4, 5), (1, 2)])
def test_windows_cover_the_grid_once(tokens: int, window: int):
    cells = window_cells(tokens, window)
    assert len(cells) == pooled_token_count(tokens, window)
    assert sorted(cell for inside in cells for cell in inside) == list(range(tokens))


def test_window_means_average_the_real_cells():
    x = np.arange(9.0).reshape(1, 9, 1)
    np.testing.assert_allclose(window_means(x, 2)[0, :, 0], [2.0, 3.5, 6.5, 8.0])


def adapter_weights(config: AdapterConfig, biased: bool = False) -> dict[str, np.ndarray]:
    shapes = {name: spec.shape for name, spec in adapter_table(config, 20, 24).items()}
    if biased:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return draw(shapes, seed=4)


@pytest.mark.parametrize("kind", ["mlp_2layer", "linear", "avgpool", "attentional_pool"])
def test_adapters_give_the_promised_number_of_tokens(kind: str):
    config = AdapterConfig(type=kind, pool_heads=4)
    x = RNG.standard_normal((2, 16, 20))
    assert adapter(x, adapter_weights(config), config).shape == (2, config.output_num_tokens(16), 24)


def test_attentional_pool_of_equal_cells_is_their_value():
    config = AdapterConfig(type="attentional_pool", pool_heads=4)
    weights = adapter_weights(config, biased=True)
    cell = RNG.standard_normal((2, 1, 20))
    value = cell @ weights["v_proj.weight"].T + weights["v_proj.bias"]
    value = value @ weights["o_proj.weight"].T + weights["o_proj.bias"]
    value = value @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    got = adapter(np.repeat(cell, 16, axis=1), weights, config)
    assert_same_function(got, np.repeat(value, 4, axis=1), "pooled")


def test_mlp_adapter_by_hand():
    config = AdapterConfig(type="mlp_2layer", activation="relu")
    weights = {name: np.array(value) for name, value in HAND_ADAPTER.items()}
    np.testing.assert_allclose(adapter(np.array([[[1.0], [-3.0]]]), weights, config), [[[3 * 3.0 - 1], [-1.0]]])


HAND_ADAPTER = {"proj1.weight": [[2.0]], "proj1.bias": [1.0], "proj2.weight": [[3.0]], "proj2.bias": [-1.0]}


# Vision towers


SIGLIP = TowerConfig(
    image_size=12,
    patch_size=4,
    dim=12,
    n_layers=1,
    n_heads=3,
    ffn_hidden_dim=20,
    activation="quick_gelu",
    norm_eps=1e-5,
)
CLIP = dataclasses.replace(SIGLIP, class_token=True, patch_bias=False, pre_norm=True, final_norm=False)


def tower_weights(tower: TowerConfig) -> dict[str, np.ndarray]:
    return draw({name: spec.shape for name, spec in tower_table(tower).items()}, seed=6)


PIXELS = RNG.standard_normal((2, 3, 12, 12))


def test_patches_are_read_row_by_row():
    found = patches(PIXELS, 4)
    assert found.shape == (2, 9, 48)
    np.testing.assert_array_equal(found[1, 7].reshape(3, 4, 4), PIXELS[1, :, 8:12, 4:8])


@pytest.mark.parametrize("tower", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_towers_give_one_feature_a_patch(tower: TowerConfig):
    weights = tower_weights(tower)
    got = vision_tower(PIXELS, weights, tower)
    assert got.shape == (2, 9, 12)
    moved = PIXELS.copy()
    moved[0, :, 0, 0] += 1
    changed = (vision_tower(moved, weights, tower) != got).any(axis=-1)
    np.testing.assert_array_equal(changed, [[True] * 9, [False] * 9])


@pytest.mark.parametrize("tower", [SIGLIP, CLIP], ids=["siglip", "clip"])
def test_a_tower_without_attention_works_patch_by_patch(tower: TowerConfig):
    weights = tower_weights(tower)
    for part in ("weight", "bias"):
        weights[f"layers.0.attention.o_proj.{part}"] *= 0
    expected = patches(PIXELS, 4) @ weights["patch_embedding.weight"].reshape(12, 48).T
    expected = expected + (0 if tower is CLIP else weights["patch_embedding.bias"])
    expected = expected + weights["position_embedding.weight"][1 if tower is CLIP else 0 :]
    if tower is CLIP:
        expected = norm(expected, submodule(weights, "pre_norm"), "layernorm", 1e-5)
    block = submodule(weights, "layers.0")
    normed = norm(expected, submodule(block, "mlp_norm"), "layernorm", 1e-5)
    hidden = normed @ block["mlp.up_proj.weight"].T + block["mlp.up_proj.bias"]
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    expected = expected + hidden @ block["mlp.down_proj.weight"].T + block["mlp.down_proj.bias"]
    if tower is SIGLIP:
        expected = norm(expected, submodule(weights, "norm"), "layernorm", 1e-5)
    assert_same_function(vision_tower(PIXELS, weights, tower), expected, "tower")


def test_a_tower_of_one_patch_attends_to_itself():
    weights = tower_weights(SIGLIP)
    for name in ("mlp.down_proj.weight", "mlp.down_proj.bias"):
        weights[f"layers.0.{name}"] *= 0
    weights["position_embedding.weight"] = weights["position_embedding.weight"][:1]
    block = submodule(weights, "layers.0")
    x = PIXELS[:, :, :4, :4].reshape(2, 1, 48) @ weights["patch_embedding.weight"].reshape(12, 48).T
    x = x + weights["patch_embedding.bias"] + weights["position_embedding.weight"]
    value = norm(x, submodule(block, "attention_norm"), "layernorm", 1e-5)
    for name in ("attention.v_proj", "attention.o_proj"):
        value = value @ block[f"{name}.weight"].T + block[f"{name}.bias"]
    expected = norm(x + value, submodule(weights, "norm"), "layernorm", 1e-5)
    assert_same_function(vision_tower(PIXELS[:, :, :4, :4], weights, SIGLIP), expected, "tower")


def test_a_tower_without_positions_does_not_know_them():
    weights = tower_weights(SIGLIP)
    weights["position_embedding.weight"] = np.zeros((9, 12))
    turned = np.concatenate([PIXELS[:, :, :, 4:], PIXELS[:, :, :, :4]], axis=3)
    got, moved = vision_tower(PIXELS, weights, SIGLIP), vision_tower(turned, weights, SIGLIP)
    assert_same_function(moved, got[:, [1, 2, 0, 4, 5, 3, 7, 8, 6]], "turned")


# Derivatives: complex steps agree with differences of real values


@pytest.mark.parametrize("arch", ["cross_attention", "mot", "moma"])
def test_complex_steps_pass_through_every_architecture(arch: str):
    vlm = {"cross_attention": CROSS, "mot": MOT, "moma": MOMA}[arch]
    weights = weights_of(CONFIG, vlm) | {"image": IMAGE, "embeds": EMBEDS}

    def loss(w: dict[str, np.ndarray]) -> Any:
        if arch == "cross_attention":
            return np.sum(cross_attention_decoder(w, CONFIG, CROSS, TOKENS, w["image"]).logits ** 2)
        decoder: Any = mot_decoder if arch == "mot" else moma_decoder
        return np.sum(decoder(w, CONFIG, vlm, w["embeds"], MIXED).logits ** 2)

    direction = {name: step * weights[name].std() / 10 for name, step in random_direction(weights, RNG).items()}
    exact = directional_derivative(loss, weights, direction)
    assert central_difference(loss, weights, direction, step=1e-3) == pytest.approx(exact, rel=1e-8)


def test_complex_steps_pass_through_adapters_and_towers():
    config = AdapterConfig(type="attentional_pool", pool_heads=4)
    weights = adapter_weights(config) | {"x": RNG.standard_normal((2, 16, 20))}
    direction = random_direction(weights, RNG)
    cases: list[tuple[Any, dict[str, np.ndarray]]] = [
        (lambda w: np.sum(adapter(w["x"], w, config) ** 2), weights),
        (lambda w: np.sum(vision_tower(PIXELS, w, CLIP) ** 2), tower_weights(CLIP)),
    ]
    for function, values in cases:
        direction = random_direction(values, RNG)
        exact = directional_derivative(function, values, direction)
        assert central_difference(function, values, direction, step=1e-3) == pytest.approx(exact, rel=1e-8)
