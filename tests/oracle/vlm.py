"""The language model with images, one function per architecture. Gradients of these come from complex steps.

Shapes: B batch, S text tokens, N image tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, MoMaConfig, MoTConfig
from tests.oracle.attention import attention
from tests.oracle.cross_attention import cross_attention_block, fires_after
from tests.oracle.embedding import output_head, token_embedding
from tests.oracle.linear import Scalar, Weights, below, submodule
from tests.oracle.moma import moma_ffn
from tests.oracle.mot import by_modality, mot_block, stream
from tests.oracle.norm import norm
from tests.oracle.transformer import (
    finished,
    head_weights,
    qk_norm_type,
    rope_of,
    transformer,
    transformer_block,
    window_of,
)


@dataclass
class VLMOutput:
    """Logits of the text, outputs of modules by path, router losses summed, and counts by layer and modality."""

    logits: np.ndarray
    activations: dict[str, np.ndarray]
    aux_loss: Scalar = 0.0
    z_loss: Scalar = 0.0
    expert_counts: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)


def joint_decoder(
    weights: Weights,
    config: ModelConfig,
    tokens: np.ndarray,
    image: np.ndarray,
    key_padding_mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    prompt_lengths: np.ndarray | None = None,
) -> VLMOutput:
    """The image's embeddings (B, N, D) before the text in one causal decoder; logits of the text.

    Args:
        key_padding_mask: bool (B, N + T), of the image and then the text, wherever the image stands.
        positions: int (B,), how many text tokens of each row stand before the image, or (B, F) before each of F equal
            parts of it. The logits of a text token are those that the next one is predicted from: of the last position
            before it that is real, or its own.
        prompt_lengths: int (B,), how many text tokens of each row see the image, which stands before the text, and
            each other in both directions; None: all attention is causal.
    """
    count = image.shape[1]
    prefix_lengths = None if prompt_lengths is None else count + prompt_lengths
    if positions is None:
        out = transformer(
            weights, config, tokens, prefix_embeds=image, output_slice=slice(count, None),
            key_padding_mask=key_padding_mask, prefix_lengths=prefix_lengths,
        )  # fmt: skip
    else:
        text = config.embedding_scale * token_embedding(tokens, submodule(weights, "token_embedding"))
        both = np.concatenate([image, text], axis=1)
        orders = [_order(np.atleast_1d(row).tolist(), count, text.shape[1]) for row in positions]
        exists = np.ones(both.shape[:2], bool) if key_padding_mask is None else key_padding_mask
        embeds, mask = (
            np.stack([row[order] for row, order in zip(each, orders, strict=True)]) for each in (both, exists)
        )
        out = transformer(weights, config, inputs_embeds=embeds, key_padding_mask=mask)
        sources = np.array([_before_next(order, row, count) for order, row in zip(orders, mask, strict=True)])
        out.logits = np.take_along_axis(out.logits, sources[..., None], axis=1)
    counts = {layer: {"all": count} for layer, count in out.expert_counts.items()}
    return VLMOutput(out.logits, out.activations, out.aux_loss, out.z_loss, counts)


def _order(positions: list[int], count: int, length: int) -> list[int]:
    """What stands at each place of a row, as an index into the image's ``count`` tokens and then the text's."""
    order, size = [], count // len(positions)
    for place in range(length + 1):
        for part, position in enumerate(positions):
            if position == place:
                order += range(part * size, (part + 1) * size)
        order += [count + place] if place < length else []
    return order


def _before_next(order: list[int], real: np.ndarray, count: int) -> list[int]:
    """For each text token the last place before the next one that is real, or its own."""
    own = [place for place, source in enumerate(order) if source >= count]
    return [
        max([this, *(place for place in range(this, following) if real[place] and order[place] < count)])
        for this, following in zip(own, [*own[1:], len(order)], strict=True)
    ]


def cross_attention_decoder(
    weights: Weights,
    config: ModelConfig,
    vlm: CrossAttentionConfig,
    tokens: np.ndarray,
    image: np.ndarray | None,
    image_mask: np.ndarray | None = None,
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
) -> VLMOutput:
    """The text decoder, with a block that reads the image (B, N, D), if there is one, after every n-th layer.

    Args:
        image_mask: bool (B, N), True where text may look; a row that may look nowhere skips the blocks.
    """
    looked_up = token_embedding(tokens, submodule(weights, "token_embedding"))
    x_BSD = config.embedding_scale * looked_up
    out = VLMOutput(np.empty(0), {"token_embedding.embedding": looked_up, "token_embedding": x_BSD})
    for layer in range(config.n_layers):
        path = f"layers.{layer}"
        x_BSD, saved, named = transformer_block(
            x_BSD, submodule(weights, path), config, layer, x_BSD.shape[1], doc_ids, key_padding_mask
        )
        out.activations |= below(path, named) | {path: x_BSD}
        if saved.moe is not None:
            out.aux_loss = out.aux_loss + saved.moe.routing.aux_loss
            out.z_loss = out.z_loss + saved.moe.routing.z_loss
            out.expert_counts[layer] = {"all": saved.moe.routing.counts_E}
        block = fires_after(layer, vlm)
        if block is not None and image is not None:
            path = f"cross_attention_layers.{block}"
            own = submodule(weights, path)
            read_BSD, named = cross_attention_block(x_BSD, image, own, config, vlm, image_mask)
            out.activations |= below(path, named) | {path: read_BSD}
            x_BSD = (
                read_BSD if image_mask is None else np.where(np.any(image_mask, axis=1)[:, None, None], read_BSD, x_BSD)
            )
    out.activations["norm"] = norm(x_BSD, submodule(weights, "norm"), config.norm_type, config.norm_eps)
    return _with_logits(out, out.activations["norm"], weights, config)


def mot_decoder(
    weights: Weights,
    config: ModelConfig,
    vlm: MoTConfig,
    embeds: np.ndarray,
    modality_ids: np.ndarray,
    *,
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
    output_slice: slice | None = None,
) -> VLMOutput:
    """Mixture of transformers over embeddings (B, S, D) of both modalities in any order.

    Args:
        modality_ids: (B, S) index into ``vlm.mot_modalities``.
    """
    x_BSD, where = embeds, stream(modality_ids, doc_ids, key_padding_mask)
    out = VLMOutput(np.empty(0), {})
    for layer in range(config.n_layers):
        x_BSD, losses = mot_block(x_BSD, submodule(weights, f"layers.{layer}"), config, vlm, layer, where)
        out.activations[f"layers.{layer}"] = x_BSD
        out.aux_loss, out.z_loss = out.aux_loss + losses.aux_loss, out.z_loss + losses.z_loss
        if losses.counts:
            out.expert_counts[layer] = losses.counts
    normed = by_modality(x_BSD, submodule(weights, "mot_norms"), config, vlm, where)
    return _with_logits(out, normed[:, output_slice or slice(None)], weights, config)


def moma_decoder(
    weights: Weights,
    config: ModelConfig,
    vlm: MoMaConfig,
    embeds: np.ndarray,
    modality_ids: np.ndarray,
    *,
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
    output_slice: slice | None = None,
    noise: Mapping[int, Mapping[str, np.ndarray]] | None = None,
) -> VLMOutput:
    """One attention for all, experts of each modality that choose their tokens.

    Args:
        noise: {layer: {modality: (N, E)}} Gumbel noise of the choice; none in evaluation.
    """
    x_BSD = embeds
    out = VLMOutput(np.empty(0), {})
    for layer in range(config.n_layers):
        own = submodule(weights, f"layers.{layer}")
        attention_in = norm(x_BSD, submodule(own, "attention_norm"), config.norm_type, config.norm_eps)
        attention_out, _ = attention(
            attention_in,
            submodule(own, "attention"),
            rope_of(config, layer, x_BSD.shape[1]),
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            eps=config.norm_eps,
            sliding_window=window_of(config, layer),
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            qk_norm_over=config.qk_norm_over,
            qk_norm_type=qk_norm_type(config),
            doc_ids=doc_ids,
            key_padding_mask=key_padding_mask,
        )
        middle_BSD = x_BSD + attention_out
        mlp_in = norm(middle_BSD, submodule(own, "mlp_norm"), config.norm_type, config.norm_eps)
        layer_noise = None if noise is None else noise[layer]
        mlp_out, counts = moma_ffn(
            mlp_in, submodule(own, "mlp"), vlm, config.activation, modality_ids, key_padding_mask, layer_noise
        )
        x_BSD = middle_BSD + mlp_out
        named = {"attention_norm": attention_in, "attention": attention_out, "mlp_norm": mlp_in, "mlp": mlp_out}
        out.activations |= below(f"layers.{layer}", named) | {f"layers.{layer}": x_BSD}
        out.expert_counts[layer] = counts
    out.activations["norm"] = norm(x_BSD, submodule(weights, "norm"), config.norm_type, config.norm_eps)
    return _with_logits(out, out.activations["norm"][:, output_slice or slice(None)], weights, config)


def _with_logits(out: VLMOutput, x_BSD: np.ndarray, weights: Weights, config: ModelConfig) -> VLMOutput:
    projected = output_head(x_BSD, head_weights(weights))
    out.logits = finished(projected, config)
    out.activations |= {"output_head.proj": projected, "output_head": out.logits}
    return out
