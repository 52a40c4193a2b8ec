"""How each architecture takes the image: what its strategy gives the transformer besides the text.

Shapes: B batch, F frames of a clip (1 for an image), h, w pixels, N image
tokens, T text tokens, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from kempnerforge_jax.model.modality import ModalityContext
from kempnerforge_jax.registry import registry
from shared_config.schema.vlm import VLMConfig


class SeesImages(Protocol):
    """What a strategy needs of a `VLMWrapper`."""

    frames_per_clip: int

    @property
    def tokens_per_frame(self) -> int:
        """Image tokens of a frame."""
        ...

    def encode_images(
        self, pixel_values: Float[Array, "B ... 3 h w"], frame_mask: Bool[Array, "B F"] | None = None
    ) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"] | None]:
        """Image tokens, and which of them are of frames that exist; None: all."""
        ...


@dataclass(frozen=True)
class ModalityStrategy:
    """How an architecture takes the image. A new strategy is a subclass that defines `prepare`, and `num_image_tokens`
    if it differs; registered in category "modality_strategy" under the ``arch`` of its config, it is called with that
    config.
    """

    places_image: ClassVar[bool] = False
    """Whether the image may stand anywhere in the text."""
    vlm_config: VLMConfig | None = None

    def prepare(
        self,
        wrapper: SeesImages,
        pixel_values: Float[Array, "B ... 3 h w"],
        input_ids: Integer[Array, "B T"],
        frame_mask: Bool[Array, "B F"] | None = None,
    ) -> ModalityContext:
        """The context of the transformer besides the text.

        Args:
            wrapper: whose `VLMWrapper.encode_images` gives the image tokens.
            pixel_values, input_ids, frame_mask: as for `VLMWrapper.forward`.

        Returns:
            the image, and which of its positions are real; the wrapper adds what is known of the text.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no prepare")

    def num_image_tokens(self, wrapper: SeesImages) -> int:
        """Positions of the residual stream that an image or a whole clip takes."""
        return wrapper.frames_per_clip * wrapper.tokens_per_frame


@registry.register("modality_strategy", "joint_decoder")
class JointDecoderStrategy(ModalityStrategy):
    """The image stands before the text in the residual stream, or within it; logits are those of the text."""

    places_image: ClassVar[bool] = True

    def prepare(
        self,
        wrapper: SeesImages,
        pixel_values: Float[Array, "B ... 3 h w"],
        input_ids: Integer[Array, "B T"],
        frame_mask: Bool[Array, "B F"] | None = None,
    ) -> ModalityContext:
        """As `ModalityStrategy`."""
        image_embeds, image_mask = wrapper.encode_images(pixel_values, frame_mask)
        padding_BS = None
        if image_mask is not None:
            padding_BS = jnp.concatenate([image_mask, jnp.ones(input_ids.shape, bool)], axis=1)
        text = slice(image_embeds.shape[1], None)
        return ModalityContext(prefix_embeds=image_embeds, output_slice=text, key_padding_mask=padding_BS)


@registry.register("modality_strategy", "mot")
class MoTStrategy(JointDecoderStrategy):
    """As `JointDecoderStrategy`, before the text: positions belong to the image or to the text by where they stand."""

    places_image: ClassVar[bool] = False


@registry.register("modality_strategy", "moma")
class MoMaStrategy(JointDecoderStrategy):
    """As `JointDecoderStrategy`, before the text: positions belong to the image or to the text by where they stand."""

    places_image: ClassVar[bool] = False


@registry.register("modality_strategy", "cross_attention")
class CrossAttentionStrategy(ModalityStrategy):
    """The image is read by separate blocks; the residual stream is the text."""

    def prepare(
        self,
        wrapper: SeesImages,
        pixel_values: Float[Array, "B ... 3 h w"],
        input_ids: Integer[Array, "B T"],
        frame_mask: Bool[Array, "B F"] | None = None,
    ) -> ModalityContext:
        """As `ModalityStrategy`."""
        image_embeds, image_mask = wrapper.encode_images(pixel_values, frame_mask)
        return ModalityContext(image_features=image_embeds, image_mask=image_mask)

    def num_image_tokens(self, wrapper: SeesImages) -> int:
        """0: the image is not part of the residual stream."""
        return 0


def build_modality_strategy(vlm: VLMConfig) -> ModalityStrategy:
    """The strategy registered under the config's ``arch``; for an architecture without one, that of the joint decoder
    or of cross-attention, by ``image_tokens_in_stream`` of the config.

    Raises:
        KeyError: "Unknown modality_strategy: ..." with the names that exist.
    """
    if registry.has("architecture", vlm.arch) and not registry.has("modality_strategy", vlm.arch):
        return JointDecoderStrategy(vlm) if vlm.image_tokens_in_stream else CrossAttentionStrategy(vlm)
    return registry.get("modality_strategy", vlm.arch)(vlm)
