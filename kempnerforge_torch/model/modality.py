"""What a call of the transformer may carry besides tokens.

Shapes: B batch, T text tokens, S positions of the residual stream (image and text), P prefix positions, N image
tokens, D model dim.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ModalityContext:
    """Image inputs, masks and slices of one forward; every field None by default.

    Attributes:
        inputs_embeds: (B, S, D), instead of tokens.
        prefix_embeds: (B, P, D), put before the embedded tokens.
        output_slice: positions of the residual stream that get logits.
        image_features: (B, N, D), what cross-attention reads.
        image_mask: bool (B, N), True where cross-attention may look.
        modality_ids: int (B, S), the modality of each position, by index in the architecture's list of modalities.
        key_padding_mask: bool (B, S), True at real positions; with any of the inputs. The others are seen by no
            position, sent to no expert and counted nowhere.
        image_keys_values: in place of image_features, the keys and values that every cross-attention block computes
            from them, (B, K, N, h) each.
        noise_seed: int (), seed of the routing noise of this training step, where experts choose tokens.

    Raises:
        ValueError: for invalid combinations.
    """

    inputs_embeds: Float[Tensor, "B S D"] | None = None
    prefix_embeds: Float[Tensor, "B P D"] | None = None
    output_slice: slice | None = None
    image_features: Float[Tensor, "B N D"] | None = None
    image_mask: Bool[Tensor, "B N"] | None = None
    modality_ids: Integer[Tensor, "B S"] | None = None
    key_padding_mask: Bool[Tensor, "B S"] | None = None
    image_keys_values: tuple[tuple[Float[Tensor, "B K N h"], Float[Tensor, "B K N h"]], ...] | None = None
    noise_seed: Integer[Tensor, ""] | None = None

    def __post_init__(self) -> None:
        sources = self._given("inputs_embeds", "prefix_embeds", "image_features", "image_keys_values")
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are given: at most one of them is allowed")
        if self.image_mask is not None and not self.reads_image:
            raise ValueError("image_mask is given, image_features = None: the mask needs the features that it masks")
        if self.modality_ids is not None and self.inputs_embeds is None and self.prefix_embeds is None:
            raise ValueError("modality_ids is given: it needs prefix_embeds or inputs_embeds, and neither is given")

    @property
    def reads_image(self) -> bool:
        """Whether there is something for cross-attention to read."""
        return self.image_features is not None or self.image_keys_values is not None

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]


def with_text(
    image: ModalityContext, text_mask: Bool[Tensor, "B T"] | None, noise_seed: Integer[Tensor, ""] | None
) -> ModalityContext:
    """The prepared context, extended by what is known of the text, whose positions come last in the stream."""
    real_BS = image.key_padding_mask
    if text_mask is not None:
        batch, length = text_mask.shape
        prefix = 0 if image.prefix_embeds is None else image.prefix_embeds.shape[1]
        if real_BS is None:
            real_BS = torch.ones((batch, prefix + length), dtype=torch.bool, device=text_mask.device)
        real_BS = torch.cat([real_BS[:, :prefix], real_BS[:, prefix:] & text_mask], dim=1)
    return dataclasses.replace(
        image, key_padding_mask=real_BS, noise_seed=image.noise_seed if noise_seed is None else noise_seed
    )
