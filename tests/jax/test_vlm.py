"""What is JAX's own in vision-language models: one jit for all layouts, scans, abstract models, captures in a trace."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kempnerforge_jax.model.expert_choice import ExpertChoiceSigmoidRouter
from kempnerforge_jax.model.hooks import capture
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.state import get_state, merge, set_state, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper, build_vlm_wrapper, inner_transformer
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from tests.oracle.weights import draw

MODEL = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32
)
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
CASES: dict[str, tuple[ModelConfig, VLMConfig, AdapterConfig]] = {
    "joint_decoder": (MODEL, JointDecoderConfig(max_text_len=8), AdapterConfig(type="avgpool")),
    "cross_attention": (
        MODEL,
        CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=2),
        AdapterConfig(type="attentional_pool", pool_heads=4),
    ),
    "mot": (MODEL, MoTConfig(max_text_len=8, mot_image_n_kv_heads=2), AdapterConfig(type="linear")),
    "mot_experts": (MODEL.replace(num_experts=3), MoTConfig(max_text_len=8), AdapterConfig()),
    "moma": (MODEL, MoMaConfig(max_text_len=8, moma_capacity_factor=0.3), AdapterConfig()),
}
RNG = np.random.default_rng(0)
CLIPS: Any = RNG.standard_normal((2, 2, 3, 8, 8)).astype(np.float32)
TEXT: Any = RNG.integers(0, 37, (2, 8)).astype(np.int32)
FRAMES: Any = np.array([[True, False], [True, True]])
TEXT_MASK = np.arange(8) < np.array([[8], [5]])


def model_of(name: str) -> VLMWrapper:
    model, vlm, adapter = CASES[name]
    built = build_vlm_wrapper(model, VISION, adapter, vlm, frames_per_clip=2, rngs=None)
    tower = vit_tower(VISION)
    table = wrapper_table(model, vlm, adapter, tower, tower.dim)
    set_state(built, draw({key: spec.shape for key, spec in table.items()}, 3))
    return built


@pytest.mark.parametrize("name", CASES)
def test_one_jit_serves_every_layout(name: str) -> None:
    graphdef, params, buffers = split(model_of(name))
    traces = []

    @jax.jit
    def loss(params: Any, pixels: Any, text: Any, frames: Any, mask: Any, seed: Any) -> Any:
        traces.append(1)
        return merge(graphdef, params, buffers).run(pixels, text, frames, text_mask=mask, noise_seed=seed).logits

    first = loss(params, CLIPS, TEXT, FRAMES, TEXT_MASK, np.int32(1))
    second = loss(params, CLIPS, TEXT, ~FRAMES, TEXT_MASK[::-1], np.int32(2))
    third = loss(params, CLIPS, TEXT, np.zeros_like(FRAMES), TEXT_MASK, np.int32(1))
    assert len(traces) == 1
    assert np.isfinite(first).all()
    assert np.isfinite(third).all()
    assert np.abs(first - second).max() > 1e-3
    eager = model_of(name).run(CLIPS, TEXT, FRAMES, text_mask=jnp.asarray(TEXT_MASK), noise_seed=jnp.int32(1)).logits
    np.testing.assert_allclose(first, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mot", "moma"])
def test_one_jit_serves_every_order_of_modalities(name: str) -> None:
    """A modality that is absent gives its weights gradients of 0."""
    transformer = inner_transformer(model_of(name))
    graphdef, params, buffers = split(transformer)
    traces = []

    @jax.jit
    @jax.grad
    def gradient(params: Any, context: ModalityContext) -> Any:
        traces.append(1)
        return (merge(graphdef, params, buffers).run(modality=context).logits ** 2).sum()

    embeds = jnp.asarray(RNG.standard_normal((2, 9, 20)), jnp.float32)
    for ids in (np.zeros((2, 9), int), np.ones((2, 9), int), RNG.integers(0, 2, (2, 9))):
        gradients = gradient(params, ModalityContext(inputs_embeds=embeds, modality_ids=jnp.asarray(ids)))
        for key, value in gradients.items():
            absent = (".image." in key and ids.all()) or (".text." in key and not ids.any())
            assert np.isfinite(value).all(), key
            assert absent <= (not np.asarray(value).any()), key
    assert len(traces) == 1


@pytest.mark.parametrize("name", CASES)
def test_scan_and_remat_are_the_same_function(name: str) -> None:
    model = model_of(name)
    graphdef, params, buffers = split(model)

    def loss(params: Any, scan: bool, remat: bool) -> Any:
        merged = merge(graphdef, params, buffers)
        out = merged.run(CLIPS, TEXT, FRAMES, noise_seed=jnp.int32(7), scan_layers=scan, remat=remat)
        return (out.logits**2).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    truth, expected = gradient(params, False, False)
    got, gradients = gradient(params, True, True)
    np.testing.assert_allclose(got, truth, rtol=1e-5)
    for key, value in expected.items():
        np.testing.assert_allclose(
            gradients[key], value, rtol=0, atol=1e-4 * float(np.abs(value).max() + 1), err_msg=key
        )


@pytest.mark.parametrize("name", CASES)
def test_abstract_models_are_initialised_throughout(name: str) -> None:
    model_config, vlm, adapter = CASES[name]
    build = lambda: build_vlm_wrapper(model_config, VISION, adapter, vlm, 2, rngs=None)  # noqa: E731
    model = nnx.eval_shape(build)
    model.init_weights_and_freqs(seed=2)
    expected = build()
    expected.init_weights_and_freqs(seed=2)
    for key, value in get_state(expected).items():
        np.testing.assert_array_equal(get_state(model)[key], value, err_msg=key)
    seed = jnp.int32(3)
    got, truth = (jax.jit(each.run)(CLIPS, TEXT, noise_seed=seed).logits for each in (model, expected))
    np.testing.assert_array_equal(got, truth)


def test_capture_inside_jit_names_every_part() -> None:
    graphdef, params, buffers = split(model_of("mot"))

    @jax.jit
    def run(params: Any) -> Any:
        model = merge(graphdef, params, buffers)
        with capture(model) as activations:
            logits, _ = model(CLIPS, TEXT)
        return dict(activations), logits

    activations, logits = run(params)
    for name in (
        "vision_encoder.layers.0",
        "adapter",
        "transformer.layers.1.attn.q_proj.image",
        "transformer.layers.0",
    ):
        assert np.isfinite(activations[name]).all()
    np.testing.assert_array_equal(activations["transformer.output_head"], logits)


def test_counts_of_the_last_forward() -> None:
    model = model_of("moma")
    model(CLIPS, TEXT, frame_mask=FRAMES, text_mask=jnp.asarray(TEXT_MASK))
    counts = inner_transformer(model).get_moma_expert_counts()
    assert {layer: {name: number.tolist() for name, number in by.items()} for layer, by in counts.items()} == {
        layer: {"image": [-(-12 * 3 // 10)] * 4, "text": [-(-13 * 3 // 10)] * 4} for layer in range(2)
    }
    assert float(model.transformer.get_moe_aux_loss()) == 0.0
    experts = model_of("mot_experts")
    experts(CLIPS, TEXT, frame_mask=FRAMES)
    counted = experts.transformer.get_moma_expert_counts()
    assert {name: int(number.sum()) for name, number in counted[1].items()} == {"image": 2 * 12, "text": 2 * 16}
    assert float(experts.transformer.get_moe_aux_loss()) > 3.5


def test_experts_choose_by_rank_and_skip_what_is_not_valid() -> None:
    router = ExpertChoiceSigmoidRouter(2, 2, capacity_factor=0.5, rngs=None)
    assert router.gate.weight is not None
    router.gate.weight.set_value(jnp.eye(2))
    x = jnp.asarray([[1.0, 0.0], [3.0, 1.0], [3.0, 2.0], [9.0, 9.0]])
    valid = jnp.asarray([True, True, True, False])
    weights, tokens, scores = router(x, valid, return_scores=True)
    assert tokens.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_array_equal(weights, jnp.take_along_axis(scores, tokens, axis=0))
    fewer = router.run(x, valid & (x[:, 1] > 0))
    assert fewer.weights[1].tolist() == [0, 0]
    np.testing.assert_array_equal(router.rerouted(fewer, fewer.tokens).weights, fewer.weights)


def test_bfloat16_models_keep_their_routers_wide() -> None:
    model = model_of("moma").to(jnp.bfloat16)

    @jax.jit
    def run(pixels: jax.Array) -> Any:
        with capture(model, ["transformer.layers.0.mlp.experts.text.router.gate"]) as activations:
            logits, _ = model(pixels, TEXT)
        return dict(activations), logits

    activations, logits = run(CLIPS.astype(jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    assert activations["transformer.layers.0.mlp.experts.text.router.gate"].dtype == jnp.float32
    assert np.isfinite(logits.astype(jnp.float32)).all()


def test_a_wrapper_hands_on_every_option_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("joint_decoder"), jnp.zeros((1, 2), jnp.int32)
    options: Any = {name: name for name in ("kv_caches", "limit_capacity", "factored_logits", "scan_layers", "remat")}
    monkeypatch.setattr(Transformer, "run", lambda _, given, **others: (given, others))
    said: Any = model.run(None, ids, **options)
    given, others = said
    assert given is ids
    assert {name: value for name, value in others.items() if name != "modality"} == {
        **options,
        "allow_image_inputs": False,
    }
