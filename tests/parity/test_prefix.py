"""Prompts with attention in both directions: forward, gradient, cached decoding and generation, in both backends and
against the oracle.

Shapes: B rows, S positions of the stream, D model dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.parity.validation import validation_weights
from shared_config.schema import AdapterConfig, JointDecoderConfig, ModelConfig, VisionEncoderConfig
from tests.oracle.transformer import transformer, transformer_backward
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.strategies import model_configs
from tests.tolerance import assert_same_function

NIGHTLY = settings.get_current_profile_name() == "nightly"
ROWS, LENGTH, SLOTS, NEW = 3, 11, 16, 4
WINDOWED = ModelConfig(
    dim=20, head_dim=6, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=37, ffn_hidden_dim=24, max_seq_len=SLOTS,
    sliding_window=3, attention_pattern=("window", "full"), attention_softcap=2.0, norm_type="rmsnorm_1p",
    embedding_scale=2.5,
)  # fmt: skip
Case = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Embeddings (B, S, D), lengths of prefixes (B,), which positions are real (B, S)."""


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return {name: w.astype(np.float64) for name, w in validation_weights(parameter_table(config), seed=5).items()}


@st.composite
def cases(draw: st.DrawFn, dim: int) -> Case:
    lengths = draw(st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS))
    first = draw(st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
    x = np.random.default_rng(draw(st.integers(0, 2**16))).standard_normal((ROWS, LENGTH, dim))
    return x, np.array(lengths, np.int32), np.arange(LENGTH) >= np.array(first)[:, None]


@settings(max_examples=25 if NIGHTLY else 1, deadline=None)
@given(data=st.data())
def test_any_model_is_the_oracle_forward_and_backward(data: st.DataObject) -> None:
    config = data.draw(model_configs(experts=False))
    x, lengths, real = data.draw(cases(config.dim))
    weights = weights_of(config)
    masks: dict[str, Any] = {"key_padding_mask": real, "prefix_lengths": lengths}
    truth = transformer(weights, config, inputs_embeds=x, **masks)
    scales = np.random.default_rng(2).standard_normal(truth.logits.shape) * real[..., None]
    dx = transformer_backward(scales, truth, weights, config)["inputs_embeds"]
    for side in BACKENDS:
        model, context = side.model(config, weights), side.module("model.modality").ModalityContext
        given = {name: side.array(value) for name, value in masks.items()}
        factors = side.array(scales)

        def weighted(x: Any, model: Any = model, context: Any = context, given: Any = given, f: Any = factors) -> Any:
            return model.run(modality=context(inputs_embeds=x, **given)).logits * f

        assert_same_function(side.run(weighted, x), truth.logits * scales, f"{side}: logits")
        assert_same_function(side.gradients(weighted, x)[0], dx, f"{side}: gradient")


@functools.cache
def decoder(backend: Torch) -> Any:
    return backend.model(WINDOWED, weights_of(WINDOWED))


@functools.cache
def step_of(backend: Torch) -> Callable[..., Any]:
    """Logits and caches by the fields of a context and caches, in JAX as one program for each shape."""
    context = backend.module("model.modality").ModalityContext
    if backend.name == "torch":
        return lambda arrays, caches: decoder(backend).run(modality=context(**arrays), kv_caches=caches)
    state = backend.module("model.state")
    graphdef, params, buffers = state.split(decoder(backend))

    @jax.jit
    def step(params: Any, buffers: Any, arrays: Any, caches: Any) -> Any:
        return state.merge(graphdef, params, buffers).run(modality=context(**arrays), kv_caches=caches)

    return functools.partial(step, params, buffers)


@on_both
@settings(max_examples=25 if NIGHTLY else 1, deadline=None)
@given(data=st.data())
def test_decoding_after_a_prefix_is_the_full_forward(backend: Torch, data: st.DataObject) -> None:
    """A prefix within the first chunk; later ones are told of it, or not."""
    x, lengths, real = data.draw(cases(WINDOWED.dim))
    first = data.draw(st.sampled_from([size for size in (4, 8, LENGTH) if size >= lengths.max()]))
    masks: dict[str, Any] = {"key_padding_mask": real, "prefix_lengths": lengths}
    truth = transformer(weights_of(WINDOWED), WINDOWED, inputs_embeds=x, **masks).logits
    cache, dtype, found = backend.module("model.attention").KVCache, backend.array(np.zeros(0)).dtype, []
    spare = {"spare": SLOTS - 1} if data.draw(st.booleans()) else {}
    caches = [
        cache(ROWS, SLOTS, 2, 6, dtype, sliding_window=window, **(spare if window else {}))
        for window in WINDOWED.layer_windows
    ]
    is_told, start = data.draw(st.booleans()), 0
    for size in (first, *[1] * (LENGTH - first)):
        part = slice(start, start + size)
        given = {"inputs_embeds": x[:, part], "key_padding_mask": real[:, part]}
        given |= {"prefix_lengths": lengths} if is_told or start == 0 else {}
        arrays = {name: backend.array(value) for name, value in given.items()}
        output = step_of(backend)(arrays, caches)
        caches, start = output.kv_caches, start + size
        found.append(backend.numpy(output.logits))
    assert_same_function(np.concatenate(found, axis=1) * real[..., None], truth * real[..., None], "cached")


@on_both
def test_a_prefix_that_is_not_whole_is_refused(backend: Torch) -> None:
    """Outside jit; within, what is computed of its row is NaN."""
    model, context = decoder(backend), backend.module("model.modality").ModalityContext
    x, cache = backend.array(np.zeros((ROWS, 4, WINDOWED.dim))), backend.module("model.attention").KVCache
    lengths = backend.array(np.array([2, 5, 6], np.int32))

    def caches() -> list[Any]:
        return [cache(ROWS, SLOTS, 2, 6, x.dtype) for _ in range(WINDOWED.n_layers)]

    def run(x: Any, lengths: Any, kv_caches: Any) -> Any:
        return model.run(modality=context(inputs_embeds=x, prefix_lengths=lengths), kv_caches=kv_caches)

    with pytest.raises(ValueError, match=r"prefix_lengths\[1\] = 5: must be at most 4"):
        run(x, lengths, caches())
    if backend.name == "jax":
        logits = np.asarray(jax.jit(lambda x, n: run(x, n, caches()).logits)(x, lengths))
        assert np.isnan(logits).all((1, 2)).tolist() == [False, True, True]


# Generation

SEEING = ModelConfig(
    dim=20, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=4, vocab_size=37, ffn_hidden_dim=26, max_seq_len=32,
    num_experts=3, moe_top_k=2, sliding_window=7, attention_pattern=("full", "window"),
)  # fmt: skip
VISION = VisionEncoderConfig(type="vit", image_size=8, patch_size=4, feature_dim=12, n_heads=3, n_layers=1)
ADAPTER, FRAMES, VLM = AdapterConfig(type="linear"), 2, JointDecoderConfig(max_text_len=8, prefix_lm=True)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
PIXELS = np.random.default_rng(2).standard_normal((3, FRAMES, 3, 8, 8))
SHOWN = np.array([[True, False], [True, True], [False, False]])


@functools.lru_cache(maxsize=2)
def seeing_model(backend: Torch) -> Any:
    model = backend.build(backend.module("model.vlm").build_vlm_wrapper, SEEING, VISION, ADAPTER, VLM, FRAMES)
    table = wrapper_table(SEEING, VLM, ADAPTER, vit_tower(VISION), VISION.feature_dim)
    backend.module("model.state").set_state(model, validation_weights(table, 3))
    return model


@functools.cache
def most_probable(with_image: bool) -> np.ndarray:
    """The most probable tokens (B, NEW) by full forwards of each row alone, without a cache."""
    model, new = seeing_model(BACKENDS[0]), np.zeros((len(PROMPTS), NEW), np.int64)
    for row, prompt in enumerate(PROMPTS):
        pixels, shown = (torch.from_numpy(of[row : row + 1]) if with_image else None for of in (PIXELS, SHOWN))
        text, lengths = list(prompt), torch.tensor([len(prompt)])
        for step in range(NEW):
            with torch.no_grad():
                given = (pixels, torch.tensor([text]), shown)
                logits = model.run(*given, prompt_lengths=lengths, limit_capacity=False).logits
            new[row, step] = int(logits[0, -1].argmax())
            text.append(int(new[row, step]))
    return new


@pytest.mark.parametrize(
    ("backend", "with_image"),
    [(BACKENDS[0], True), (BACKENDS[0], False), (BACKENDS[1], True), *[(BACKENDS[1], False)] * NIGHTLY],
)
def test_prompts_are_read_as_a_whole(backend: Torch, with_image: bool) -> None:
    """Of rows of unequal prompts, one of which has no image, one half of a clip, in a mixture of experts; whatever
    chunks are asked for.
    """
    images = {"pixel_values": PIXELS, "frame_mask": SHOWN} if with_image else {}
    generate = backend.module("model.generate").generate
    whole = np.asarray(generate(seeing_model(backend), PROMPTS, NEW, temperature=0.0, prefill_chunk=2, **images))
    new = np.stack([row[len(prompt) :][:NEW] for row, prompt in zip(whole, PROMPTS, strict=True)])
    np.testing.assert_array_equal(new, most_probable(with_image))


@on_both
def test_prompts_of_text_alone_have_lengths(backend: Torch) -> None:
    lengths, ids = (backend.array(np.array(values, np.int32)) for values in ([2, 0], [[3, 1, 4], [1, 5, 9]]))
    context = seeing_model(backend).context(None, ids, prompt_lengths=lengths)
    assert backend.numpy(context.prefix_lengths).tolist() == [2, 0]


@on_both
def test_images_have_one_place(backend: Torch) -> None:
    generate = backend.module("model.generate").generate
    with pytest.raises(
        ValueError, match=r"image_positions = .*: must be None without an image that has no fixed place"
    ):
        generate(seeing_model(backend), PROMPTS, 1, pixel_values=PIXELS, image_positions=[0, 0, 0])


@on_both
def test_a_prefix_has_any_number_of_images(backend: Torch) -> None:
    """A row whose first image does not exist is one that has the other alone; clips are as long as they are."""
    small = SEEING.replace(num_experts=0)
    parts, table = (small, VISION, ADAPTER, VLM), wrapper_table(small, VLM, ADAPTER, vit_tower(VISION), 12)
    tokens, prompts = np.array([PROMPTS[0], PROMPTS[0][::-1]]), np.array([3, 5])

    def logits(side: Torch, pixels: np.ndarray, rows: slice, *shown: np.ndarray) -> Any:
        model = side.build(side.module("model.vlm").build_vlm_wrapper, *parts)
        side.module("model.state").set_state(model, validation_weights(table, 3))
        given = (pixels, tokens[rows], prompts[rows], *shown)
        return side.run(lambda x, ids, n, *mask: model.run(x, ids, *mask, prompt_lengths=n).logits, *given)

    both = logits(backend, PIXELS[:2], slice(2), np.array([[False, True], [True, True]]))
    first, second = (logits(BACKENDS[0], PIXELS[row : row + 1, 1], slice(row, row + 1)) for row in (0, 1))
    assert_same_function(both[:1], first, "the second image alone")
    assert np.abs(both[1:] - second).max() > 1e-3
    build = functools.partial(backend.build, backend.module("model.vlm").build_vlm_wrapper)
    for model, count in ((build(*parts, FRAMES), 3), (build(*parts[:3], VLM.replace(prefix_lm=False)), 2)):
        with pytest.raises(ValueError, match=f"pixel_values has {count} frames: must have from 1 to {count - 1}"):
            model.context(backend.array(np.zeros((1, count, 3, 8, 8))), backend.array(tokens[:1]))


def test_a_prefix_is_an_array_of_a_program() -> None:
    """One program serves prompts of any lengths."""
    side = BACKENDS[1]
    model, context = decoder(side), side.module("model.modality").ModalityContext
    count = 0

    @jax.jit
    def logits(x: Any, lengths: Any) -> Any:
        nonlocal count
        count += 1
        return model.run(modality=context(inputs_embeds=x, prefix_lengths=lengths)).logits

    x = jnp.ones((ROWS, LENGTH, WINDOWED.dim))
    first, second = (np.asarray(logits(x, jnp.asarray(lengths))) for lengths in ([0, 3, 5], [1, 2, LENGTH]))
    assert count == 1
    assert not np.array_equal(first, second)
