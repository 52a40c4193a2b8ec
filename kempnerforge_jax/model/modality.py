"""What a call of the transformer may carry besides tokens.

Shapes: B batch, T text tokens, S positions of the residual stream (image and text), P prefix positions, N image
tokens, D model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from kempnerforge_jax.model.checks import check_ids, check_shape, nan_outside, wide

ARRAYS = (
    "inputs_embeds",
    "prefix_embeds",
    "image_features",
    "image_mask",
    "modality_ids",
    "key_padding_mask",
    "image_keys_values",
    "noise_seed",
    "prefix_positions",
    "prefix_lengths",
)

_Bounds = tuple[int | None, int | None, int | None]
"""Start, stop and step of a slice."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class ModalityContext:
    """Image inputs, masks and slices of one forward; every field None by default. A pytree: its arrays may be traced.

    Attributes:
        inputs_embeds: (B, S, D), instead of tokens.
        prefix_embeds: (B, P, D), put before the embedded tokens.
        output_slice: positions of the residual stream that get logits; static under jit.
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
        ValueError: for invalid combinations, inside a trace too.
    """

    inputs_embeds: Float[Array, "B S D"] | None = None
    prefix_embeds: Float[Array, "B P D"] | None = None
    output_slice: slice | None = None
    image_features: Float[Array, "B N D"] | None = None
    image_mask: Bool[Array, "B N"] | None = None
    modality_ids: Integer[Array, "B S"] | None = None
    key_padding_mask: Bool[Array, "B S"] | None = None
    image_keys_values: tuple[tuple[Float[Array, "B K N h"], Float[Array, "B K N h"]], ...] | None = None
    noise_seed: Integer[Array, ""] | None = None
    prefix_positions: Integer[Array, "B ..."] | None = None
    prefix_lengths: Integer[Array, "B"] | None = None

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

    def tree_flatten_with_keys(self) -> tuple[list[tuple[object, object]], _Bounds | None]:
        """Arrays are leaves; the slice is static, as a tuple because slices have no hash before Python 3.12."""
        bounds = self.output_slice
        static = None if bounds is None else (bounds.start, bounds.stop, bounds.step)
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ARRAYS], static

    @classmethod
    def tree_unflatten(cls, static: _Bounds | None, arrays: Iterable[object]) -> ModalityContext:
        """Without the checks: JAX rebuilds containers around placeholders, and what it rebuilds was checked before."""
        context = object.__new__(cls)
        for name, value in zip(ARRAYS, arrays, strict=True):
            object.__setattr__(context, name, value)
        object.__setattr__(context, "output_slice", None if static is None else slice(*static))
        return context


def with_text(
    image: ModalityContext, text_mask: Bool[Array, "B T"] | None, noise_seed: Integer[Array, ""] | None
) -> ModalityContext:
    """The prepared context, extended by what is known of the text, whose positions come last in the stream."""
    real_BS = image.key_padding_mask
    if text_mask is not None:
        batch, length = text_mask.shape
        prefix = 0 if image.prefix_embeds is None else image.prefix_embeds.shape[1]
        if real_BS is None:
            real_BS = jnp.ones((batch, prefix + length), bool)
        real_BS = jnp.concatenate([real_BS[:, :prefix], real_BS[:, prefix:] & text_mask], axis=1)
    return dataclasses.replace(
        image, key_padding_mask=real_BS, noise_seed=image.noise_seed if noise_seed is None else noise_seed
    )


def with_prompt(image: ModalityContext, prompt_lengths: Integer[Array, "B"]) -> ModalityContext:
    """The context in which the image, if there is one, and so many tokens of text after it see each other."""
    lengths_B, count = wide(prompt_lengths), 0 if image.prefix_embeds is None else image.prefix_embeds.shape[1]
    return dataclasses.replace(image, prefix_lengths=jnp.where(lengths_B < 0, -1, lengths_B + count))


def with_positions(image: ModalityContext, positions: Integer[Array, "B ..."]) -> ModalityContext:
    """The context of image and text in which the prefix, or each part of it, stands after so many text tokens."""
    assert image.prefix_embeds is not None
    prefix, real_BS = image.prefix_embeds.shape[1], image.key_padding_mask
    if real_BS is not None:
        real_BS = placed(real_BS[:, :prefix], real_BS[:, prefix:], positions)
    return dataclasses.replace(image, prefix_positions=positions, output_slice=None, key_padding_mask=real_BS)


def placed(
    prefix: Shaped[Array, "B P ..."], text: Shaped[Array, "B T ..."], positions: Integer[Array, "B ..."]
) -> Shaped[Array, "B S ..."]:
    """Both as one stream: each of N equal parts of a row's prefix after so many of its text tokens; (B,) is one part.

    positions 0, 2, of a prefix P and a text T:                    P P T T T
                                                                   T T P P T
    positions (1, 2), (3, 0), of a prefix with parts P P and Q Q:  T P P T Q Q T
                                                                   Q Q T T T P P
    """
    both, count = jnp.concatenate([prefix, text], axis=1), prefix.shape[1]
    places_BN, parts_BN = _in_order(jnp.clip(positions, 0, text.shape[1]))
    size = count // places_BN.shape[1]
    begun_BS, inside_BS, offset_BS = _parts_at(places_BN, size, both.shape[1])
    steps_S = jnp.arange(both.shape[1])
    own_BS = jnp.take_along_axis(parts_BN, jnp.maximum(begun_BS - 1, 0), axis=1)
    source_BS = jnp.where(inside_BS, size * own_BS + offset_BS, count + steps_S - size * begun_BS)
    return jnp.take_along_axis(both, source_BS.reshape(*source_BS.shape, *[1] * (both.ndim - 2)), axis=1)


def _in_order(positions: Array) -> tuple[Array, Array]:
    """Places (B, N) of parts as they follow in the stream, and which part stands at each."""
    places_BN = wide(positions).reshape(len(positions), -1)
    parts_BN = jnp.argsort(places_BN, axis=1, stable=True)
    return jnp.take_along_axis(places_BN, parts_BN, axis=1), parts_BN


def _parts_at(places_BN: Array, size: int, length: int) -> tuple[Array, Array, Array]:
    """For each position (B, S) of a stream how many parts have begun, whether it is in the last of these, and how far
    from its start.
    """
    starts_BN = places_BN + size * jnp.arange(places_BN.shape[1])
    steps_S = jnp.arange(length)
    begun_BS = (steps_S >= starts_BN[..., None]).sum(axis=1)
    offset_BS = steps_S - jnp.take_along_axis(starts_BN, jnp.maximum(begun_BS - 1, 0), axis=1)
    return begun_BS, (begun_BS > 0) & (offset_BS < size), offset_BS


def with_prefix(text: Float[Array, "B T D"], modality: ModalityContext) -> Float[Array, "B S D"]:
    """The residual stream of embedded text, and of the prefix if there is one."""
    if modality.prefix_embeds is None:
        return text
    prefix_BPD, positions = modality.prefix_embeds.astype(text.dtype), modality.prefix_positions
    if positions is None:
        return jnp.concatenate([prefix_BPD, text], axis=1)
    check_shape("prefix_positions", positions, (len(text), *positions.shape[1:2]))
    places_BN = positions.reshape(len(text), -1)
    if prefix_BPD.shape[1] % places_BN.shape[1]:
        shape = f"prefix_positions.shape = {tuple(positions.shape)}"
        raise ValueError(f"{shape}: parts must be equal, and the prefix has {prefix_BPD.shape[1]} positions")
    check_ids("prefix_positions", positions, text.shape[1] + 1)
    stream_BSD = placed(prefix_BPD, text, positions)
    for extreme_B in (places_BN.min(axis=1), places_BN.max(axis=1)):
        stream_BSD = nan_outside(stream_BSD, extreme_B, text.shape[1] + 1)
    return stream_BSD


def with_logits(stream: Float[Array, "B S D"], modality: ModalityContext) -> Float[Array, "B S_out D"]:
    """The positions that get logits."""
    if modality.prefix_embeds is not None and modality.prefix_positions is not None:
        prefix, positions = modality.prefix_embeds.shape[1], modality.prefix_positions
        return of_text(stream, positions, prefix, modality.key_padding_mask)
    return stream if modality.output_slice is None else stream[:, modality.output_slice]


def of_text(
    stream: Float[Array, "B S D"],
    positions: Integer[Array, "B ..."],
    count: int,
    real_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T D"]:
    """Of a stream with a prefix of ``count`` positions, placed by parts, what each text token's logits come from: the
    last real position of the prefix before the next text token if one stands between, as it is known to follow.
    """
    places_BN, _ = _in_order(positions)
    size, length = count // places_BN.shape[1], stream.shape[1]
    _, inside_BS, _ = _parts_at(places_BN, size, length)
    seen_BS = inside_BS if real_BS is None else real_BS & inside_BS
    last_BS = jax.lax.cummax(jnp.where(seen_BS, jnp.arange(length), 0), axis=1)
    steps_T = jnp.arange(length - count)
    own_BT = steps_T + size * (steps_T >= places_BN[..., None]).sum(axis=1)
    before_next_BT = jnp.concatenate([own_BT[:, 1:], jnp.full_like(own_BT[:, :1], length)], axis=1) - 1
    source_BT = jnp.maximum(own_BT, jnp.take_along_axis(last_BS, before_next_BT, axis=1))
    return jnp.take_along_axis(stream, source_BT[..., None], axis=1)
