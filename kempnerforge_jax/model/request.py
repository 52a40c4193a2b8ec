"""A request for generation, checked before the first token is drawn.

Shapes: B rows, S tokens of the longest prompt, N new tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from kempnerforge_jax.model.checks import check_mask
from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.model.state import State, merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.model.vlm import VLMWrapper, inner_transformer
from shared_config.contract.decoding import (
    PREFILL_CHUNK,
    Prompts,
    SamplingConfig,
    cache_length,
    check_architecture,
    check_request,
    check_uniforms,
    draw_uniforms,
    prefill_chunks,
    read_prompts,
)
from shared_config.contract.image_places import ImagePlaces, check_image_positions, check_images


@dataclass(frozen=True)
class Request:
    """A request for generation, checked.

    Attributes:
        image: its place in the stream, or what is read of it at every step; None: text alone.
        image_tokens: int32 (B,), positions of the stream that the images of each prompt take.
        prefix_lengths: int32 (B,), positions of each row, the image's and the prompt's, that see each other in both
            directions; None: none do.
        has_windows: whether some layers have a window.
        uniforms: float64 (B, N); None: greedy.
        cache_length: positions of the caches.
        chunks: (start, size) of the parts in which the prompts are read.
    """

    prompts: Prompts
    image: ModalityContext | None
    image_tokens: np.ndarray
    prefix_lengths: Int[Array, "B"] | None
    has_windows: bool
    max_new_tokens: int
    sampling: SamplingConfig
    uniforms: np.ndarray | None
    cache_length: int
    chunks: Sequence[tuple[int, int]]

    @property
    def image_in_every_step(self) -> ModalityContext | None:
        """What text reads of the image at every step; None where there is none, or the caches hold it. The last token
        of a prompt, which the first step reads again, sees all of a prefix, whatever window it has.
        """
        if self.prefix_lengths is not None and self.has_windows:
            return ModalityContext(prefix_lengths=self.prefix_lengths)
        return None if image_tokens(self.image) else self.image

    @property
    def image_within(self) -> bool:
        """Whether images stand within the prompts, not before them."""
        return self.image is not None and self.image.prefix_positions is not None


PromptTokens = Integer[Array, "B S"] | np.ndarray | Sequence[Sequence[int] | np.ndarray | Integer[Array, "_S"]]
"""Token ids: int (B, S), or B rows of any lengths."""


def make_request(
    model: Transformer | VLMWrapper,
    prompt_tokens: PromptTokens,
    max_new_tokens: int,
    sampling: SamplingConfig,
    *,
    prompt_lengths: Integer[Array, "B"] | np.ndarray | Sequence[int] | int | None = None,
    uniforms: np.ndarray | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pixel_values: Float[Array, "B ... 3 h w"] | np.ndarray | None = None,
    frame_mask: Bool[Array, "B F"] | np.ndarray | None = None,
    image_positions: Integer[Array, "B ..."] | np.ndarray | Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> Request:
    """The checked request of `generate` or `stream`, from their arguments.

    Raises:
        ValueError: naming what can't be generated.
    """
    transformer = _checked(model)
    config = transformer.config
    vlm = transformer.vlm_config
    image_token = None if vlm is None else vlm.image_token
    prompts = read_prompts(prompt_tokens, prompt_lengths, config.vocab_size, image_token)
    rows = len(prompts.lengths)
    places = check_image_positions(image_positions, prompts, _movable_images(model, pixel_values))
    image = _read_image(model, pixel_values, frame_mask, rows, places)
    prefix = image_tokens(image)
    own = np.full(rows, prefix, np.int32) if places is None else places.tokens(prefix)
    check_request(
        prompts,
        max_new_tokens,
        config.max_seq_len,
        config.vocab_size,
        sampling.eos_token_ids,
        prefill_chunk,
        own,
    )
    has_prefix = vlm is not None and vlm.has_prefix
    if has_prefix and image is not None:
        image = replace(image, prefix_positions=jnp.zeros(rows, jnp.int32), output_slice=None)
    slots = cache_length(prompts, max(max_new_tokens, 1), config.max_seq_len, own)
    longest, before = int((prompts.lengths + own).max()), 0 if places is not None or has_prefix else prefix
    return Request(
        prompts,
        image,
        own,
        jnp.asarray(prompts.lengths + own) if has_prefix else None,
        any(window is not None for window in config.layer_windows),
        max_new_tokens,
        sampling,
        None if sampling.temperature == 0 else _uniforms(sampling.seed, uniforms, rows, max_new_tokens),
        slots,
        prefill_chunks(longest, slots, slots)
        if has_prefix
        else prefill_chunks(longest - 1 - before, prefill_chunk, slots - before),
    )


def _checked(model: Transformer | VLMWrapper) -> Transformer:
    """The transformer of a model that can generate."""
    transformer = inner_transformer(model)
    check_architecture(transformer.vlm_config)
    if transformer.token_embedding is None or transformer.output_head is None:
        raise ValueError("model is a pipeline stage: generate needs the embedding and the head in one model")
    return transformer


def _read_image(
    model: Transformer | VLMWrapper, pixel_values: Any, frame_mask: Any, rows: int, places: ImagePlaces | None
) -> ModalityContext | None:
    """The context of the transformer for the images of each row."""
    if pixel_values is None and frame_mask is not None:
        raise ValueError("frame_mask is given, pixel_values = None: the mask needs the images that it masks")
    if pixel_values is None:
        return None
    if not isinstance(model, VLMWrapper):
        raise ValueError(f"pixel_values is given: model = {type(model).__name__} has no encoder for images")
    check_images(pixel_values.shape, rows)
    graphdef, params, buffers = split(model)
    frames = _existing(None if frame_mask is None else jnp.asarray(frame_mask), places)
    positions = None if places is None else jnp.asarray(places.positions)
    return _compiled_reading(graphdef)(params, buffers, jnp.asarray(pixel_values), frames, positions)


def _existing(frames: jax.Array | None, places: ImagePlaces | None) -> jax.Array | None:
    """The mask of frames, without images that a row does not have."""
    if places is None or places.exists is None:
        return frames
    exists_BN = jnp.asarray(places.exists)
    if frames is None:
        return exists_BN
    check_mask("frame_mask", frames, exists_BN.shape)
    return frames & exists_BN


def _movable_images(model: Transformer | VLMWrapper, pixel_values: Any) -> int:
    """How many images of a row may stand anywhere in the text."""
    if pixel_values is None or not isinstance(model, VLMWrapper) or not model.strategy.places_image:
        return 0
    if (vlm := inner_transformer(model).vlm_config) is not None and vlm.has_prefix:
        return 0
    return pixel_values.shape[1] if pixel_values.ndim == 5 else 1


def image_tokens(image: ModalityContext | None) -> int:
    """Positions of the residual stream that the image takes."""
    return 0 if image is None or image.prefix_embeds is None else image.prefix_embeds.shape[1]


def _uniforms(seed: int | jax.Array | None, uniforms: Any, rows: int, count: int) -> np.ndarray:
    if uniforms is not None:
        return check_uniforms(uniforms, rows, count)
    if isinstance(seed, jax.Array):
        return np.asarray(jax.random.uniform(seed, (rows, count)), np.float64)
    return draw_uniforms(seed, rows, count)


def weight_of(model: Transformer) -> Float[Array, "V D"]:
    """The embedding, whose dtype and device are those of the model."""
    assert model.token_embedding is not None
    return model.token_embedding.embedding.weight.get_value()


@functools.lru_cache(maxsize=8)
def _compiled_reading(graphdef: Any) -> Any:
    """The context of images (B, [F,] 3, h, w)."""

    def read(
        params: State,
        buffers: State,
        pixel_values: jax.Array,
        frame_mask: jax.Array | None,
        positions: jax.Array | None,
    ) -> Any:
        model: Any = merge(graphdef, params, buffers)
        no_text = jnp.zeros((len(pixel_values), 0), jnp.int32)
        context = model.context(pixel_values, no_text, frame_mask, image_positions=positions)
        if context.prefix_embeds is not None:
            return context
        return model.transformer.precompute_image_kv(context)

    return jax.jit(read)
