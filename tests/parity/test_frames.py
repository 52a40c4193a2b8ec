"""Frames that a clip lacks stay in their places, masked: every other position is that of a full clip.

The oracle reads the tokens of all frames, absent ones too, as one sequence whose absent keys are masked; the backends
are given NaN for absent frames. A clip without any frame is text alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.noise import image_noise
from shared_config.contract.vision import wrapper_table
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
from tests.oracle.linear import linear, submodule
from tests.oracle.vlm import cross_attention_decoder, joint_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw
from tests.parity.backends import Torch, on_both
from tests.tolerance import assert_same_function

DENSE = ModelConfig(
    dim=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=13, ffn_hidden_dim=10, max_seq_len=24,
    rope_theta=50.0,
)  # fmt: skip
ROUTED = DENSE.replace(num_experts=3, moe_frequency=2)
WINDOWED = DENSE.replace(sliding_window=7)
VISION, ADAPTER = VisionEncoderConfig(type="random", feature_dim=6, num_tokens=2), AdapterConfig(type="linear")
CASES: dict[str, tuple[ModelConfig, VLMConfig]] = {
    "joint_decoder": (DENSE, JointDecoderConfig(max_text_len=8)),
    "joint_decoder, experts": (ROUTED, JointDecoderConfig(max_text_len=8)),
    "joint_decoder, window": (WINDOWED, JointDecoderConfig(max_text_len=8)),
    "cross_attention": (DENSE, CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1)),
    "mot": (DENSE, MoTConfig(max_text_len=8)),
    "moma": (DENSE, MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3})),
}
FRAMES = np.array([[True, False, True, False], [False, True, True, True], [True] * 4, [False] * 4])
PIXELS = np.random.default_rng(8).uniform(-1, 1, (*FRAMES.shape, 3, 2, 2))
TEXT = np.random.default_rng(9).permuted(np.tile(np.arange(DENSE.vocab_size), (5, 1)), axis=1)[:, : len(FRAMES)].T
"""No two rows begin alike: experts that choose tokens would choose among equals by their rounding."""


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@on_both
@pytest.mark.parametrize("case", CASES)
def test_absent_frames_are_masked_where_they_stand(backend: Torch, case: str) -> None:
    model = model_of(backend, case)
    model.eval()
    lacking = np.where(FRAMES[..., None, None, None], PIXELS, np.nan)

    def logits(pixels: Any, frames: Any) -> Any:
        return model.run(pixels, backend.array(TEXT), frames).logits

    def text_logits(text: Any) -> Any:
        return model.run(None, text).logits

    seen, unseen, text = (
        backend.run(logits, lacking, FRAMES),
        backend.run(logits, lacking, np.zeros_like(FRAMES)),
        backend.run(text_logits, TEXT),
    )
    assert_same_function(seen, truth(case, FRAMES), "clips")
    assert_same_function(unseen, text, "clips without any frame")
    assert_same_function(text, truth(case, None), "text alone")
    if case != "moma":  # whose experts choose among all rows
        assert_same_function(seen[3], text[3], "a row without any frame, among others")


@functools.cache
def weights_of(case: str) -> dict[str, np.ndarray]:
    table = wrapper_table(*CASES[case], ADAPTER, None, VISION.feature_dim)
    return draw({name: spec.shape for name, spec in table.items()}, 3)


def model_of(backend: Torch, case: str) -> Any:
    config, vlm = CASES[case]
    build = backend.module("model.vlm").build_vlm_wrapper
    model = backend.build(build, config, VISION, ADAPTER, vlm, FRAMES.shape[1])
    backend.module("model.state").set_state(model, weights_of(case))
    return model


def truth(case: str, frames: np.ndarray | None) -> np.ndarray:
    """Logits of the text by the oracle, after the tokens of all frames of which some are masked; None: text alone."""
    (config, vlm), weights = CASES[case], submodule(weights_of(case), "transformer")
    image = image_tokens(case) if frames is not None else np.zeros((len(TEXT), 0, config.dim))
    shown = np.ones(image.shape[:2], bool) if frames is None else np.repeat(frames, VISION.num_tokens, axis=1)
    if isinstance(vlm, CrossAttentionConfig):
        return cross_attention_decoder(weights, config, vlm, TEXT, None if frames is None else image, shown).logits
    real = np.concatenate([shown, np.ones(TEXT.shape, bool)], axis=1)
    if isinstance(vlm, JointDecoderConfig):
        return joint_decoder(weights, config, TEXT, image, real).logits
    embeds = np.concatenate([image, weights["token_embedding.embedding.weight"][TEXT]], axis=1)
    ids = np.repeat([[0] * image.shape[1] + [1] * TEXT.shape[1]], len(TEXT), axis=0)
    options: Any = {"key_padding_mask": real, "output_slice": slice(image.shape[1], None)}
    if isinstance(vlm, MoTConfig):
        return mot_decoder(weights, config, vlm, embeds, ids, **options).logits
    assert isinstance(vlm, MoMaConfig)
    return moma_decoder(weights, config, vlm, embeds, ids, **options).logits


def image_tokens(case: str) -> np.ndarray:
    """(B, N, D), of every frame, present or not."""
    features = image_noise(PIXELS.reshape(-1, *PIXELS.shape[2:]), VISION.num_tokens, VISION.feature_dim)
    tokens = linear(features, weights_of(case), "adapter.proj")
    return tokens.reshape(len(PIXELS), -1, DENSE.dim)


@on_both
def test_tokens_of_absent_frames_are_zero(backend: Torch) -> None:
    model = model_of(backend, "joint_decoder")
    model.eval()
    tokens, real = model.encode_images(backend.array(PIXELS), backend.array(FRAMES))
    tokens, real = backend.numpy(tokens), backend.numpy(real)
    np.testing.assert_array_equal(real, np.repeat(FRAMES, VISION.num_tokens, axis=1))
    np.testing.assert_array_equal((tokens != 0).any(axis=-1), real)
