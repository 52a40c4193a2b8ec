"""Checks that the inputs of a forward fit together.

Shapes: B batch, S positions of the residual stream, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kempnerforge_torch.model.attention import KVCache
from kempnerforge_torch.model.checks import (
    MAX_ID,
    check_ids,
    check_limits,
    check_mask,
    check_positions,
    check_shape,
    wide,
)
from kempnerforge_torch.model.modality import ModalityContext

NOT_WITH_CACHES = ("prefix_embeds", "output_slice", "image_features", "modality_ids")


def check_inputs(
    tokens: Shaped[Tensor, "..."] | None, modality: ModalityContext, kv_caches: Sequence[KVCache] | None
) -> None:
    """Refuse inputs that exclude each other.

    Raises:
        ValueError: naming the one that can\'t be taken.
    """
    if (tokens is None) == (modality.inputs_embeds is None):
        given = "neither is" if tokens is None else "both are"
        raise ValueError(f"tokens and modality.inputs_embeds: exactly one must be given, {given}")
    if kv_caches is None:
        return
    for name in NOT_WITH_CACHES:
        if getattr(modality, name) is not None:
            raise ValueError(f"modality.{name} is given: not allowed together with kv_caches")


def check_stream(x: Float[Tensor, "B S D"], modality: ModalityContext, doc_ids: Shaped[Tensor, "..."] | None) -> None:
    """Masks and ids must fit the residual stream ``x`` (B, S, D)."""
    batch, length, _ = x.shape
    if modality.image_mask is not None and modality.image_features is not None:
        check_mask("image_mask", modality.image_mask, modality.image_features.shape[:2])
    if modality.image_mask is not None and modality.image_keys_values is not None:
        keys_BKNh, _ = modality.image_keys_values[0]
        check_mask("image_mask", modality.image_mask, (len(keys_BKNh), keys_BKNh.shape[2]))
    if modality.noise_seed is not None:
        check_ids("noise_seed", modality.noise_seed)
        check_shape("noise_seed", modality.noise_seed, ())
    check_positions((batch, length), doc_ids, modality.key_padding_mask)


def with_whole_prefix(
    x: Float[Tensor, "B S D"],
    modality: ModalityContext,
    kv_caches: Sequence[KVCache] | None,
    doc_ids: Shaped[Tensor, "..."] | None,
) -> Float[Tensor, "B S D"]:
    """The residual stream ``x`` (B, S, D), which a prefix must not reach beyond: NaN in rows where it does, and values
    can't be seen.

    Raises:
        ValueError: a prefix that goes on after these positions, or of documents.
    """
    lengths_B, (batch, length, _) = modality.prefix_lengths, x.shape
    if lengths_B is None:
        return x
    if doc_ids is not None:
        raise ValueError("prefix_lengths is given: must be None with doc_ids, as a row has one prefix")
    check_shape("prefix_lengths", lengths_B, (batch,))
    check_ids("prefix_lengths", lengths_B, MAX_ID)
    lengths_B = wide(lengths_B)
    cached_B = 0 * lengths_B if kv_caches is None else wide(kv_caches[0].lengths)
    limits_B = cached_B + length
    check_limits("prefix_lengths", lengths_B, limits_B)
    is_part_B = (lengths_B < 0) | (lengths_B > limits_B)
    return x.masked_fill(is_part_B[:, None, None], torch.nan)
