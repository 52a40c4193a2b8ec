"""Whole vision-language models, pixels to logits: PyTorch, JAX and the oracle compute the same, with all gradients.

Layouts are drawn: several frames, padded frames, rows without an image, modalities in any order, documents, padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge_jax.model import modality as jax_modality
from kempnerforge_jax.model import transformer as jax_transformer
from kempnerforge_jax.model import vlm as jax_vlm
from kempnerforge_torch.model import modality as torch_modality
from kempnerforge_torch.model import transformer as torch_transformer
from kempnerforge_torch.model import vlm as torch_vlm
from shared_config.contract.noise import gumbel_noise
from shared_config.contract.parameters import parameter_table
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
from tests.oracle.adapter import adapter as oracle_adapter
from tests.oracle.linear import submodule
from tests.oracle.vision import vision_tower
from tests.oracle.vlm import cross_attention_decoder, joint_decoder, moma_decoder, mot_decoder
from tests.parity.components import Component, assert_parity, run_jax, run_torch
from tests.tolerance import assert_all_same_function, assert_same_function

Arrays = dict[str, np.ndarray]

RNG = np.random.default_rng(11)
MODEL = ModelConfig(
    dim=20,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    vocab_size=37,
    ffn_hidden_dim=26,
    norm_eps=1e-3,
    max_seq_len=32,
    rope_theta=50.0,
)
EXPERTS = MODEL.replace(num_experts=3, moe_frequency=2, moe_expert_ffn_multiplier=0.4)
ALL_EXPERTS = EXPERTS.replace(moe_top_k=3)
VISION = VisionEncoderConfig(type="vit", image_size=12, patch_size=4, feature_dim=18, n_heads=3, n_layers=1)
ADAPTER = AdapterConfig(type="avgpool", pool_window=2)
FRAMES, TOKENS, AUX = 3, 4, 0.1

JOINT = JointDecoderConfig(max_text_len=8)
CROSS = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=2)
MOT = MoTConfig(max_text_len=8, mot_image_n_kv_heads=2)
MOMA = MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3})
EVERYTHING = MOMA.replace(moma_capacity_factor=1.0)

CLIPS = {
    "pixels": RNG.standard_normal((2, FRAMES, 3, 12, 12)),
    "tokens": RNG.integers(0, 37, (2, 8)),
    "frames": np.array([[True, False, True], [False, False, False]]),
}
IMAGES = {"pixels": RNG.standard_normal((2, 3, 12, 12)), "tokens": CLIPS["tokens"]}
STREAM = {
    "embeds": RNG.standard_normal((2, 11, 20)),
    "ids": np.array([[0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1]]),
    "documents": np.array([[0] * 4 + [1] * 3 + [2] * 4, [0] * 7 + [1] * 4]),
    "real": np.array([[True] * 9 + [False] * 2, [True, True, False, False] + [True] * 7]),
}


def wrapper_component(
    model: ModelConfig, vlm: VLMConfig, reads: Callable[..., np.ndarray], aux: float = AUX
) -> Component:
    """A whole model; ``reads(weights, image, image_mask, tokens)`` is the oracle's language model.

    ``aux``: weight of the balancing losses, 0 where all experts are chosen, so that they are constant.
    """
    tower = vit_tower(VISION)

    def call(module: Any, given: Mapping[str, Any]) -> Any:
        out = module.run(given["pixels"], given["tokens"], given.get("frames"), noise_seed=given.get("seed"))
        return out.logits + aux * losses(out.stats) if aux else out.logits

    def oracle(weights: Arrays, given: Arrays) -> np.ndarray:
        image, mask = oracle_images(weights, given)
        return reads(submodule(weights, "transformer"), image, mask, given["tokens"])

    arguments: tuple[Any, ...] = (model, VISION, ADAPTER, vlm, FRAMES)
    return Component(
        torch=lambda: torch_vlm.build_vlm_wrapper(*arguments),
        jax=lambda rngs: jax_vlm.build_vlm_wrapper(*arguments, rngs=rngs),
        table=wrapper_table(model, vlm, ADAPTER, tower, tower.dim),
        call=call,
        oracle=oracle,
        vanishing={
            "vision_encoder.layers.0.attention.k_proj.bias": "vision_encoder.layers.0.attention.v_proj.bias",
        },
    )


def oracle_images(weights: Arrays, given: Arrays) -> tuple[np.ndarray, np.ndarray | None]:
    """Image tokens in the order of the frames, those of frames that don't exist 0, and the mask of the others."""
    pixels = given["pixels"] if given["pixels"].ndim == 5 else given["pixels"][:, None]
    exists = given.get("frames", np.ones(pixels.shape[:2], bool))
    rows = []
    for clip, frames in zip(pixels, exists, strict=True):
        features = vision_tower(clip, submodule(weights, "vision_encoder"), vit_tower(VISION))
        tokens = oracle_adapter(features, submodule(weights, "adapter"), ADAPTER)
        rows.append(np.concatenate([tokens[i] * int(frames[i]) for i in range(len(clip))]))
    return np.stack(rows), np.repeat(exists, TOKENS, axis=1) if "frames" in given else None


def padding(mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray | None:
    return None if mask is None else np.concatenate([mask, np.ones(tokens.shape, bool)], axis=1)


def losses(stats: Mapping[int, Any]) -> Any:
    """Sum of the balancing losses."""
    layers = [layer.values() if isinstance(layer, dict) else [layer] for layer in stats.values()]
    return sum((router.aux_loss for routers in layers for router in routers), 0.0)


def read_joint(model: ModelConfig) -> Callable[..., np.ndarray]:
    def read(weights: Arrays, image: np.ndarray, mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
        out = joint_decoder(weights, model, tokens, image, padding(mask, tokens))
        return out.logits + AUX * out.aux_loss

    return read


def read_cross(model: ModelConfig, vlm: CrossAttentionConfig) -> Callable[..., np.ndarray]:
    def read(weights: Arrays, image: np.ndarray, mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
        return cross_attention_decoder(weights, model, vlm, tokens, image, mask).logits

    return read


def in_stream(
    decoder: Callable[..., Any], model: ModelConfig, vlm: VLMConfig, aux: float = AUX, **options: Any
) -> Callable[..., Any]:
    def read(weights: Arrays, image: np.ndarray, mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
        text = weights["token_embedding.embedding.weight"][tokens]
        embeds = np.concatenate([image, text], axis=1)
        ids = np.repeat([[0] * image.shape[1] + [1] * tokens.shape[1]], len(tokens), axis=0)
        own = {name: value(ids, padding(mask, tokens)) for name, value in options.items()}
        cut = slice(image.shape[1], None)
        out = decoder(weights, model, vlm, embeds, ids, key_padding_mask=padding(mask, tokens), output_slice=cut, **own)
        return out.logits + aux * out.aux_loss

    return read


def moma_noise(vlm: MoMaConfig, seed: int) -> Callable[..., Any]:
    """The noise of each layer and modality, for the real tokens of that modality in the order of the batch."""

    def noise(ids: np.ndarray, real: np.ndarray | None) -> dict[int, dict[str, np.ndarray]]:
        real = np.ones(ids.shape, bool) if real is None else real
        return {
            layer: {
                name: gumbel_noise(seed, layer, group, ids.size, vlm.moma_experts_per_modality[name])[
                    ((ids == group) & real).ravel()
                ]
                for group, name in enumerate(vlm.moma_modalities)
            }
            for layer in range(MODEL.n_layers)
        }

    return noise


CASES: dict[str, tuple[Component, Arrays, tuple[str, ...]]] = {
    "joint_clips": (wrapper_component(MODEL, JOINT, read_joint(MODEL)), CLIPS, ("float32", "bfloat16")),
    "joint_experts": (wrapper_component(EXPERTS, JOINT, read_joint(EXPERTS)), IMAGES, ("float32",)),
    "cross_clips": (wrapper_component(MODEL, CROSS, read_cross(MODEL, CROSS)), CLIPS, ("float32", "bfloat16")),
    "mot_clips": (wrapper_component(MODEL, MOT, in_stream(mot_decoder, MODEL, MOT)), CLIPS, ("float32", "bfloat16")),
    "mot_experts": (wrapper_component(EXPERTS, MOT, in_stream(mot_decoder, EXPERTS, MOT)), CLIPS, ()),
    "mot_all_experts": (
        wrapper_component(ALL_EXPERTS, MOT, in_stream(mot_decoder, ALL_EXPERTS, MOT, aux=0.0), aux=0.0),
        IMAGES,
        ("float32", "bfloat16"),
    ),
    "moma_clips": (wrapper_component(MODEL, MOMA, in_stream(moma_decoder, MODEL, MOMA)), CLIPS, ("float32",)),
    "moma_noise": (
        wrapper_component(MODEL, MOMA, in_stream(moma_decoder, MODEL, MOMA, noise=moma_noise(MOMA, 9))),
        {**CLIPS, "seed": np.array(9)},
        (),
    ),
    "moma_everything": (
        wrapper_component(MODEL, EVERYTHING, in_stream(moma_decoder, MODEL, EVERYTHING)),
        IMAGES,
        ("float32", "bfloat16"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_models(name: str) -> None:
    component, inputs, rounded = CASES[name]
    assert_parity(component, inputs, rounded=rounded)


def stream_component(model: ModelConfig, vlm: VLMConfig, decoder: Callable[..., Any], **options: Any) -> Component:
    """The transformer alone, on a stream of embeddings whose modalities come in any order."""

    def call(module: Any, given: Mapping[str, Any]) -> Any:
        backend = torch_modality if type(module).__module__.startswith("kempnerforge_torch") else jax_modality
        context = backend.ModalityContext(
            inputs_embeds=given["embeds"],
            modality_ids=given["ids"],
            key_padding_mask=given.get("real"),
            noise_seed=given.get("seed"),
        )
        out = module.run(modality=context, doc_ids=given.get("documents"))
        return out.logits + AUX * losses(out.stats)

    def oracle(weights: Arrays, given: Arrays) -> np.ndarray:
        own = {name: value(given["ids"], given.get("real")) for name, value in options.items()}
        masks = {"doc_ids": given.get("documents"), "key_padding_mask": given.get("real")}
        out = decoder(weights, model, vlm, given["embeds"], given["ids"], **masks, **own)
        return out.logits + AUX * out.aux_loss

    return Component(
        torch=lambda: torch_transformer.Transformer(model, vlm_config=vlm),
        jax=lambda rngs: jax_transformer.Transformer(model, vlm_config=vlm, rngs=rngs),
        table=parameter_table(model, vlm),
        call=call,
        oracle=oracle,
        fixed=("token_embedding.embedding.weight",),
    )


RICH = MODEL.replace(qk_norm=True, norm_type="layernorm", sliding_window=4, attention_bias=True, activation="gelu")
REVERSED = MoTConfig(max_text_len=8, mot_modalities=("text", "image"))
STREAMS: dict[str, tuple[Component, Arrays]] = {
    "mot": (stream_component(MODEL, MOT, mot_decoder), STREAM),
    "mot_rich": (stream_component(RICH, REVERSED, mot_decoder), STREAM),
    "mot_experts": (stream_component(EXPERTS, MOT, mot_decoder), STREAM),
    "moma": (stream_component(MODEL, MOMA, moma_decoder), STREAM),
    "moma_rich": (
        stream_component(RICH, MOMA, moma_decoder, noise=moma_noise(MOMA, 4)),
        {**STREAM, "seed": np.array(4)},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_any_order(name: str) -> None:
    component, inputs = STREAMS[name]
    assert_parity(component, inputs, rounded=("float32",) if name == "mot" else ())


@pytest.mark.parametrize("name", ["joint_clips", "cross_clips", "mot_clips", "moma_clips"])
@given(data=st.data())
def test_drawn_clips(name: str, data: st.DataObject) -> None:
    """Frames exist or not in any pattern, none among them."""
    component, inputs, _ = CASES[name]
    frames = st.lists(st.booleans(), min_size=FRAMES, max_size=FRAMES)
    drawn = np.array(data.draw(st.lists(frames, min_size=2, max_size=2)))
    assert_same_layout(component, {**inputs, "frames": drawn})


@pytest.mark.parametrize("name", ["mot", "moma"])
@given(data=st.data())
def test_drawn_streams(name: str, data: st.DataObject) -> None:
    """Modalities in any order, or one alone; documents that end anywhere; padding anywhere."""
    component, inputs = STREAMS[name]
    shape = inputs["ids"].shape

    def flags(*rates: float) -> np.ndarray:
        rate = data.draw(st.sampled_from(rates))
        return np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).random(shape) < rate

    drawn = {
        "ids": flags(0.0, 0.3, 0.5, 1.0).astype(int),
        "documents": np.cumsum(flags(0.0, 0.2), axis=1),
        "real": ~flags(0.0, 0.2, 0.6),
    }
    assert_same_layout(component, {**inputs, **drawn})


def assert_same_layout(component: Component, inputs: Arrays) -> None:
    """Both backends and the oracle in float64, the backends with all gradients."""
    weights = component.weights()
    truth, other = run_torch(component, weights, inputs), run_jax(component, weights, inputs)
    for name in component.vanishing:
        truth.pop(f"gradient/{name}")
        other.pop(f"gradient/{name}")
    assert component.oracle is not None
    assert_same_function(truth["output"], component.oracle(weights, inputs), "output")
    assert_all_same_function(other, truth)
