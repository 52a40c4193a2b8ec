"""The decoder-only language model: blocks of attention and feed-forward layers on a residual stream.

Shapes: B batch, S sequence, N prefix embeddings, D model dim, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shared_config.schema.model import ModelConfig, RopeScaling
from tests.oracle.attention import AttentionSaved, Keys, attention, attention_backward
from tests.oracle.embedding import output_head, output_head_backward, token_embedding, token_embedding_backward
from tests.oracle.linear import Gradients, Scalar, Weights, below, has, submodule
from tests.oracle.mlp import Activations, mlp, mlp_backward
from tests.oracle.moe import MoEOptions, MoESaved, moe, moe_backward
from tests.oracle.norm import norm, norm_backward
from tests.oracle.position import rope_at

EMBEDDING, HEAD = "token_embedding.embedding.weight", "output_head.proj.weight"


@dataclass
class BlockSaved:
    x_BSD: np.ndarray
    attention_norm_BSD: np.ndarray
    attention: AttentionSaved
    middle_BSD: np.ndarray
    mlp_norm_BSD: np.ndarray
    dense: Activations | None = None
    moe: MoESaved | None = None
    mlp_BSD: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class Output:
    """What a forward gives.

    Attributes:
        activations: output of every module, by its path; heads of q_norm and k_norm are (B, S, heads, h).
        caches: one per layer, holding the tokens seen so far, to be given to the next call.
        aux_loss, z_loss: router losses summed over the layers, unweighted.
        expert_counts: {layer: (E,)} assignments of valid tokens.
    """

    logits: np.ndarray
    activations: dict[str, np.ndarray]
    caches: list[Keys]
    blocks: list[BlockSaved]
    aux_loss: Scalar = 0.0
    z_loss: Scalar = 0.0
    expert_counts: dict[int, np.ndarray] = field(default_factory=dict)


def transformer(
    weights: Weights,
    config: ModelConfig,
    tokens: np.ndarray | None = None,
    *,
    inputs_embeds: np.ndarray | None = None,
    prefix_embeds: np.ndarray | None = None,
    output_slice: slice | None = None,
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
    prefix_lengths: np.ndarray | None = None,
    caches: list[Keys] | None = None,
) -> Output:
    """Logits of every position, or of ``output_slice`` of them.

    Args:
        tokens: (B, S) ids; or else ``inputs_embeds`` (B, S, D).
        prefix_embeds: (B, N, D), put before the tokens' embeddings.
        doc_ids, key_padding_mask: (B, N + S), over the whole stream.
        prefix_lengths: (B,), how many of the first positions of the stream see each other.

    Raises:
        ValueError: a token outside the vocabulary, a position past max_seq_len, both or neither of tokens and
            inputs_embeds.
    """
    activations: dict[str, np.ndarray] = {}
    x_BSD = _embed(weights, config, tokens, inputs_embeds, prefix_embeds, activations)
    length = x_BSD.shape[1] + (int(caches[0].lengths_B.max()) if caches else 0)
    if length > config.max_seq_len:
        raise ValueError(f"sequence length = {length}: must be at most max_seq_len = {config.max_seq_len}")
    out = Output(np.empty(0), activations, caches=[], blocks=[])
    for layer in range(config.n_layers):
        cache = caches[layer] if caches else None
        own = submodule(weights, f"layers.{layer}")
        x_BSD, block, named = transformer_block(
            x_BSD, own, config, layer, length, doc_ids, key_padding_mask, prefix_lengths, cache
        )
        activations |= below(f"layers.{layer}", named) | {f"layers.{layer}": x_BSD}
        _collect(out, layer, block)
    activations["norm"] = norm(x_BSD, submodule(weights, "norm"), config.norm_type, config.norm_eps)
    sliced_BSD = activations["norm"][:, output_slice or slice(None)]
    activations["output_head.proj"] = output_head(sliced_BSD, head_weights(weights))
    out.logits = activations["output_head"] = finished(activations["output_head.proj"], config)
    return out


def transformer_block(
    x_BSD: np.ndarray,
    weights: Weights,
    config: ModelConfig,
    layer: int,
    length: int,
    doc_ids: np.ndarray | None = None,
    key_padding_mask: np.ndarray | None = None,
    prefix_lengths: np.ndarray | None = None,
    cache: Keys | None = None,
) -> tuple[np.ndarray, BlockSaved, dict[str, np.ndarray]]:
    """x + attention(attention_norm(x)), then x + mlp(mlp_norm(x)); with norms after, of what is added, or both. The
    sequence has ``length`` positions, cached ones included.
    """
    attention_in = _normed(x_BSD, weights, "attention_norm", config)
    attention_out, attention_saved = attention(
        attention_in,
        submodule(weights, "attention"),
        rope_of(config, layer, length),
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
        prefix_lengths=prefix_lengths,
        cache=cache,
    )
    attention_added = _normed(attention_out, weights, "attention_post_norm", config)
    middle_BSD = x_BSD + config.residual_scale * attention_added
    mlp_in = _normed(middle_BSD, weights, "mlp_norm", config)
    saved = BlockSaved(x_BSD, attention_in, attention_saved, middle_BSD, mlp_in)
    if config.is_moe_layer(layer):
        mlp_out, saved.moe = moe(mlp_in, submodule(weights, "mlp"), moe_options(config), key_padding_mask)
        inner = saved.moe.activations
    else:
        mlp_out, inner = mlp(mlp_in, submodule(weights, "mlp"), config.activation)
        saved.dense = inner
    saved.mlp_BSD, mlp_added = mlp_out, _normed(mlp_out, weights, "mlp_post_norm", config)
    named = {"attention_norm": attention_in, "attention": attention_out, "attention_post_norm": attention_added}
    named |= {"mlp_norm": mlp_in, "mlp": mlp_out, "mlp_post_norm": mlp_added}
    named = {name: value for name, value in named.items() if not name.endswith("_norm") or has(weights, name)}
    named |= below("attention", attention_saved.activations) | below("mlp", inner)
    return middle_BSD + config.residual_scale * mlp_added, saved, named


def transformer_backward(
    dlogits: np.ndarray,
    out: Output,
    weights: Weights,
    config: ModelConfig,
    tokens: np.ndarray | None = None,
    *,
    output_slice: slice | None = None,
    daux_loss: float = 0.0,
    dz_loss: float = 0.0,
) -> Gradients:
    """Gradients of every weight, and of "inputs_embeds" or "prefix_embeds" where they were given."""
    normed_BSD = out.activations["norm"]
    part = output_slice or slice(None)
    dnormed_BSD = np.zeros_like(normed_BSD)
    dprojected = dlogits / config.logit_divisor
    if config.logit_softcap is not None:
        dprojected = dprojected * (1 - (out.logits / config.logit_softcap) ** 2)
    dnormed_BSD[:, part], head = output_head_backward(dprojected, normed_BSD[:, part], head_weights(weights))
    last_BSD = out.activations[f"layers.{config.n_layers - 1}"]
    dx_BSD, final = norm_backward(dnormed_BSD, last_BSD, submodule(weights, "norm"), config.norm_type, config.norm_eps)
    gradients = below("norm", final)
    for layer in reversed(range(config.n_layers)):
        own = submodule(weights, f"layers.{layer}")
        dx_BSD, inner = transformer_block_backward(dx_BSD, out.blocks[layer], own, config, daux_loss, dz_loss)
        gradients |= below(f"layers.{layer}", inner)
    gradients |= _embed_backward(dx_BSD, tokens, weights, config.embedding_scale)
    head_name = HEAD if HEAD in weights else EMBEDDING
    gradients[head_name] = gradients.get(head_name, 0.0) + head["proj.weight"]
    return gradients


def transformer_block_backward(
    dy_BSD: np.ndarray,
    saved: BlockSaved,
    weights: Weights,
    config: ModelConfig,
    daux_loss: float = 0.0,
    dz_loss: float = 0.0,
) -> tuple[np.ndarray, Gradients]:
    own = submodule(weights, "mlp")
    dadded = config.residual_scale * dy_BSD
    dmlp, gradients = _normed_backward(dadded, saved.mlp_BSD, weights, "mlp_post_norm", config)
    if saved.moe is not None:
        options = moe_options(config)
        dmlp_in, inner = moe_backward(dmlp, saved.mlp_norm_BSD, saved.moe, own, options, daux_loss, dz_loss)
    else:
        assert saved.dense is not None
        dmlp_in, inner = mlp_backward(dmlp, saved.mlp_norm_BSD, saved.dense, own, config.activation)
    gradients |= below("mlp", inner)
    dmiddle, inner = _normed_backward(dmlp_in, saved.middle_BSD, weights, "mlp_norm", config)
    gradients |= inner
    dmiddle = dmiddle + dy_BSD
    attention_out = saved.attention.activations["o_proj"]
    dadded = config.residual_scale * dmiddle
    dattention, inner = _normed_backward(dadded, attention_out, weights, "attention_post_norm", config)
    gradients |= inner
    own = submodule(weights, "attention")
    scores = config.norm_eps, config.attention_scale, config.attention_softcap, qk_norm_type(config)
    dattention_in, inner = attention_backward(dattention, saved.attention, own, *scores)
    gradients |= below("attention", inner)
    dx, inner = _normed_backward(dattention_in, saved.x_BSD, weights, "attention_norm", config)
    return dx + dmiddle, gradients | inner


def _normed(x_BSD: np.ndarray, weights: Weights, name: str, config: ModelConfig) -> np.ndarray:
    """Through the norm of that name, if there is one."""
    if not has(weights, name):
        return x_BSD
    return norm(x_BSD, submodule(weights, name), config.norm_type, config.norm_eps)


def _normed_backward(
    dy_BSD: np.ndarray, x_BSD: np.ndarray, weights: Weights, name: str, config: ModelConfig
) -> tuple[np.ndarray, Gradients]:
    if not has(weights, name):
        return dy_BSD, {}
    dx_BSD, own = norm_backward(dy_BSD, x_BSD, submodule(weights, name), config.norm_type, config.norm_eps)
    return dx_BSD, below(name, own)


def finished(projected: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Logits l of the head's product: divided, and with a soft cap c then c * tanh(l / c)."""
    logits, cap = projected / config.logit_divisor, config.logit_softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


def qk_norm_type(config: ModelConfig) -> str:
    """Queries and keys have RMSNorms whatever blocks have; if these are of the kind with 1 + weight, of that kind."""
    return "rmsnorm_1p" if config.norm_type == "rmsnorm_1p" else "rmsnorm"


def kind_of(config: ModelConfig, layer: int) -> str:
    """The attention of a layer: the pattern starts again where it ends."""
    assert config.attention_pattern is not None
    return config.attention_pattern[layer % len(config.attention_pattern)]


def window_of(config: ModelConfig, layer: int) -> int | None:
    """The window of a layer, if it has one."""
    return config.sliding_window if kind_of(config, layer).startswith("window") else None


def rope_of(config: ModelConfig, layer: int, length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The tables of a layer; None where nothing is rotated. Layers with a window may have a theta of their own, and be
    left out of the scaling.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind_of(config, layer).endswith("_nope"):
        return None
    if window_of(config, layer) is not None:
        assert config.window_rope_theta is not None
        theta, scaling = config.window_rope_theta, scaling if config.window_rope_scaled else RopeScaling()
    return rope_at(np.arange(length), config.head_size, theta, scaling)


def head_weights(weights: Weights) -> dict[str, np.ndarray]:
    """The output head's own matrix, or the embedding table when there is none."""
    return {"proj.weight": weights[HEAD] if HEAD in weights else weights[EMBEDDING]}


def moe_options(config: ModelConfig) -> MoEOptions:
    return MoEOptions(
        top_k=config.moe_top_k,
        activation=config.activation,
        router=config.moe_router,
        capacity_factor=config.moe_capacity_factor,
        gradient_scale=config.moe_gradient_scale,
        sequence_aux_loss_weight=config.moe_sequence_aux_loss_weight,
        norm_topk_prob=config.moe_norm_topk_prob,
        routed_scaling=config.moe_routed_scaling,
    )


def _embed(
    weights: Weights,
    config: ModelConfig,
    tokens: np.ndarray | None,
    inputs_embeds: np.ndarray | None,
    prefix_embeds: np.ndarray | None,
    activations: dict[str, np.ndarray],
) -> np.ndarray:
    """The residual stream that enters the first block."""
    if (tokens is None) == (inputs_embeds is None):
        raise ValueError("exactly one of tokens and inputs_embeds must be given")
    if tokens is None:
        assert inputs_embeds is not None
        return inputs_embeds
    embedded = token_embedding(tokens, submodule(weights, "token_embedding"))
    activations["token_embedding.embedding"] = embedded
    embedded = activations["token_embedding"] = config.embedding_scale * embedded
    return embedded if prefix_embeds is None else np.concatenate([prefix_embeds, embedded], axis=1)


def _embed_backward(dx_BSD: np.ndarray, tokens: np.ndarray | None, weights: Weights, scale: float) -> Gradients:
    if tokens is None:
        zeros = np.zeros_like(weights[EMBEDDING])
        return {"inputs_embeds": dx_BSD, EMBEDDING: zeros}
    prefix = dx_BSD.shape[1] - tokens.shape[1]
    table = token_embedding_backward(scale * dx_BSD[:, prefix:], tokens, submodule(weights, "token_embedding"))
    gradients = below("token_embedding", table)
    return gradients | {"prefix_embeds": dx_BSD[:, :prefix]} if prefix else gradients


def _collect(out: Output, layer: int, block: BlockSaved) -> None:
    out.blocks.append(block)
    out.caches.append(block.attention.keys)
    if block.moe is not None:
        out.aux_loss = out.aux_loss + block.moe.routing.aux_loss
        out.z_loss = out.z_loss + block.moe.routing.z_loss
        out.expert_counts[layer] = block.moe.routing.counts_E
