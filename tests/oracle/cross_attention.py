"""Text that reads image features: cross-attention without positions and without causality.

Shapes: B batch, S text positions, N image tokens, D model dim, H query heads, K key/value heads, h head_dim.
"""

from __future__ import annotations

import numpy as np

from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig
from tests.oracle.attention import attend, heads_first, heads_merged, split_heads
from tests.oracle.linear import Weights, below, linear, submodule
from tests.oracle.mlp import Activations, mlp
from tests.oracle.norm import norm


def cross_attention(
    x_BSD: np.ndarray,
    image_BND: np.ndarray,
    weights: Weights,
    *,
    n_heads: int,
    n_kv_heads: int,
    image_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, Activations]:
    """Every text position attends to every image token that ``image_mask`` (B, N) allows.

    Returns:
        (B, S, D), and the output of each projection. A row whose image is masked throughout contributes 0 before the
        output projection.
    """
    q = linear(x_BSD, weights, "q_proj")
    k, v = linear(image_BND, weights, "k_proj"), linear(image_BND, weights, "v_proj")
    batch, text, image = len(x_BSD), x_BSD.shape[1], image_BND.shape[1]
    allowed_BN = np.ones((batch, image), dtype=bool) if image_mask is None else image_mask
    context_BHSh, _ = attend(
        heads_first(split_heads(q, n_heads)),
        heads_first(split_heads(k, n_kv_heads)),
        heads_first(split_heads(v, n_kv_heads)),
        np.broadcast_to(allowed_BN[:, None], (batch, text, image)),
    )
    o = linear(heads_merged(context_BHSh), weights, "o_proj")
    return o, {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}


def cross_attention_block(
    x_BSD: np.ndarray,
    image_BND: np.ndarray,
    weights: Weights,
    config: ModelConfig,
    vlm: CrossAttentionConfig,
    image_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, Activations]:
    """x + attn(attn_norm(x), image), then x + mlp(mlp_norm(x)); the image is not normalised."""
    heads, kv_heads = vlm.resolved_heads(config.n_heads)
    attention_in = norm(x_BSD, submodule(weights, "attn_norm"), config.norm_type, config.norm_eps)
    attention_out, projections = cross_attention(
        attention_in,
        image_BND,
        submodule(weights, "attn"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        image_mask=image_mask,
    )
    middle_BSD = x_BSD + attention_out
    mlp_in = norm(middle_BSD, submodule(weights, "mlp_norm"), config.norm_type, config.norm_eps)
    mlp_out, inner = mlp(mlp_in, submodule(weights, "mlp"), config.activation)
    named = {"attn_norm": attention_in, "attn": attention_out, "mlp_norm": mlp_in, "mlp": mlp_out}
    return middle_BSD + mlp_out, named | below("attn", projections) | below("mlp", inner)


def fires_after(layer: int, vlm: CrossAttentionConfig) -> int | None:
    """Number of the cross-attention block that follows a text layer, None where none does."""
    every = vlm.cross_attention_every_n_layers
    return (layer + 1) // every - 1 if (layer + 1) % every == 0 else None
