"""What a call of the transformer may carry besides tokens.

Shapes: B batch, T text tokens, S positions of the residual stream (image and text), P prefix positions, N image
tokens, D model dim.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from kempnerforge_torch.model.checks import check_ids, check_shape, nan_outside, wide


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
        prefix_positions: int (B,), how many tokens of each row stand before the prefix, or (B, N), before each of
            its N equal parts, those of one place in their order; in [0, T]. Logits are then those of the text, in place
            of ``output_slice``: after a part of the prefix, those that follow from its last real position.
        prefix_lengths: int (B,), how many of the first positions of each row's stream see each other in both
            directions, as `Mask` has it; None: none do.

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
    prefix_positions: Integer[Tensor, "B ..."] | None = None
    prefix_lengths: Integer[Tensor, "B"] | None = None

    def __post_init__(self) -> None:
        sources = self._given("inputs_embeds", "prefix_embeds", "image_features", "image_keys_values")
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are given: at most one of them is allowed")
        if self.image_mask is not None and not self.reads_image:
            raise ValueError("image_mask is given, image_features = None: the mask needs the features that it masks")
        if self.prefix_positions is not None and (self.prefix_embeds is None or self.output_slice is not None):
            raise ValueError("prefix_positions is given: it needs prefix_embeds, and output_slice = None")
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


def with_prompt(image: ModalityContext, prompt_lengths: Integer[Tensor, "B"]) -> ModalityContext:
    """The context in which the image, if there is one, and so many tokens of text after it see each other."""
    lengths_B, count = wide(prompt_lengths), 0 if image.prefix_embeds is None else image.prefix_embeds.shape[1]
    return dataclasses.replace(image, prefix_lengths=torch.where(lengths_B < 0, -1, lengths_B + count))


def with_positions(image: ModalityContext, positions: Integer[Tensor, "B ..."]) -> ModalityContext:
    """The context of image and text in which the prefix, or each part of it, stands after so many text tokens."""
    assert image.prefix_embeds is not None
    prefix, real_BS = image.prefix_embeds.shape[1], image.key_padding_mask
    if real_BS is not None:
        real_BS = placed(real_BS[:, :prefix], real_BS[:, prefix:], positions)
    return dataclasses.replace(image, prefix_positions=positions, output_slice=None, key_padding_mask=real_BS)


def placed(
    prefix: Shaped[Tensor, "B P ..."], text: Shaped[Tensor, "B T ..."], positions: Integer[Tensor, "B ..."]
) -> Shaped[Tensor, "B S ..."]:
    """Both as one stream: each of N equal parts of a row's prefix after so many of its text tokens; (B,) is one part.

    positions 0, 2, of a prefix P and a text T:                    P P T T T
                                                                   T T P P T
    positions (1, 2), (3, 0), of a prefix with parts P P and Q Q:  T P P T Q Q T
                                                                   Q Q T T T P P
    """
    both, count = torch.cat([prefix, text], dim=1), prefix.shape[1]
    places_BN, parts_BN = _in_order(positions.clamp(0, text.shape[1]))
    size = count // places_BN.shape[1]
    begun_BS, inside_BS, offset_BS = _parts_at(places_BN, size, both.shape[1])
    steps_S = torch.arange(both.shape[1], device=both.device)
    own_BS = parts_BN.gather(1, (begun_BS - 1).clamp(min=0))
    source_BS = torch.where(inside_BS, size * own_BS + offset_BS, count + steps_S - size * begun_BS)
    return torch.take_along_dim(both, source_BS.reshape(*source_BS.shape, *[1] * (both.ndim - 2)), dim=1)


def _in_order(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, N) of parts as they follow in the stream, and which part stands at each."""
    places_BN, parts_BN = wide(positions).reshape(len(positions), -1).sort(dim=1, stable=True)
    return places_BN, parts_BN


def _parts_at(places_BN: Tensor, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each position (B, S) of a stream how many parts have begun, whether it is in the last of these, and how far
    from its start.
    """
    starts_BN = places_BN + size * torch.arange(places_BN.shape[1], device=places_BN.device)
    steps_S = torch.arange(length, device=places_BN.device)
    begun_BS = (steps_S >= starts_BN[..., None]).sum(dim=1)
    offset_BS = steps_S - starts_BN.gather(1, (begun_BS - 1).clamp(min=0))
    return begun_BS, (begun_BS > 0) & (offset_BS < size), offset_BS


def with_prefix(text: Float[Tensor, "B T D"], modality: ModalityContext) -> Float[Tensor, "B S D"]:
    """The residual stream of embedded text, and of the prefix if there is one."""
    if modality.prefix_embeds is None:
        return text
    prefix_BPD, positions = modality.prefix_embeds.to(text.dtype), modality.prefix_positions
    if positions is None:
        return torch.cat([prefix_BPD, text], dim=1)
    check_shape("prefix_positions", positions, (len(text), *positions.shape[1:2]))
    places_BN = positions.reshape(len(text), -1)
    if prefix_BPD.shape[1] % places_BN.shape[1]:
        shape = f"prefix_positions.shape = {tuple(positions.shape)}"
        raise ValueError(f"{shape}: parts must be equal, and the prefix has {prefix_BPD.shape[1]} positions")
    check_ids("prefix_positions", positions, text.shape[1] + 1)
    stream_BSD = placed(prefix_BPD, text, positions)
    for extreme_B in (places_BN.amin(dim=1), places_BN.amax(dim=1)):
        stream_BSD = nan_outside(stream_BSD, extreme_B, text.shape[1] + 1)
    return stream_BSD


def with_logits(stream: Float[Tensor, "B S D"], modality: ModalityContext) -> Float[Tensor, "B S_out D"]:
    """The positions that get logits."""
    if modality.prefix_embeds is not None and modality.prefix_positions is not None:
        prefix, positions = modality.prefix_embeds.shape[1], modality.prefix_positions
        return of_text(stream, positions, prefix, modality.key_padding_mask)
    return stream if modality.output_slice is None else stream[:, modality.output_slice]


def of_text(
    stream: Float[Tensor, "B S D"],
    positions: Integer[Tensor, "B ..."],
    count: int,
    real_BS: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B T D"]:
    """Of a stream with a prefix of ``count`` positions, placed by parts, what each text token's logits come from: the
    last real position of the prefix before the next text token if one stands between, as it is known to follow.
    """
    places_BN, _ = _in_order(positions)
    size, length = count // places_BN.shape[1], stream.shape[1]
    _, inside_BS, _ = _parts_at(places_BN, size, length)
    seen_BS = inside_BS if real_BS is None else real_BS & inside_BS
    last_BS = torch.where(seen_BS, torch.arange(length, device=stream.device), 0).cummax(dim=1).values
    steps_T = torch.arange(length - count, device=stream.device)
    own_BT = steps_T + size * (steps_T >= places_BN[..., None]).sum(dim=1)
    before_next_BT = torch.cat([own_BT[:, 1:], torch.full_like(own_BT[:, :1], length)], dim=1) - 1
    source_BT = torch.maximum(own_BT, last_BS.gather(1, before_next_BT))
    return torch.take_along_dim(stream, source_BT[..., None], dim=1)
